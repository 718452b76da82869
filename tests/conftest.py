import keras
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """Start the children of the other backends first, ask them last."""

    def order(item):
        if item.originalname.endswith("other_backends_start"):
            return -1
        return 1 if item.originalname.endswith("on_another_backend") else 0

    items.sort(key=order)


@pytest.fixture(autouse=True)
def fresh_globals():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def check_layer(tmp_path):
    """Check what every layer owes its users; return its output.

    The symbolic and the real shape agree, the config and the `.keras` file round-trip,
    and under mixed precision the output is bfloat16 and the weights stay float32.
    """

    def check(layer, *arrays):
        inputs = [keras.Input(x.shape[1:]) for x in arrays]
        model = keras.Model(inputs, layer(*inputs))
        y = model(list(arrays))
        assert tuple(y.shape) == (arrays[0].shape[0], *model.output_shape[1:])

        copy = type(layer).from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()

        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(to_numpy(loaded(list(arrays))), to_numpy(y))

        config = {**layer.get_config(), "dtype": "mixed_bfloat16"}
        half = type(layer).from_config(config)
        assert keras.backend.standardize_dtype(half(*arrays).dtype) == "bfloat16"
        assert all(w.dtype == "float32" for w in half.trainable_weights)
        return to_numpy(y)

    return check


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)
