import gc
import os
from pathlib import Path

import keras
import numpy as np
import pytest

os.environ.pop("COLUMNS", None)  # xdist's, which would fix the width of all tables

LONGEST = ("test_demo.py", "test_reached.py")


def first(*values):
    """Parameters of a test whose claim no backend can change: the mark `first`."""
    return pytest.param(*values, marks=pytest.mark.first)


def pytest_xdist_auto_num_workers(config):
    """For the whole suite a process a core, and one that waits for other backends.

    Files that are named run in this process.
    """
    named = [Path(x.partition("::")[0]) for x in config.option.file_or_dir]
    if any(path.is_file() for path in named):
        return 0
    return min(os.cpu_count() or 1, 8) + 1


def pytest_collection_modifyitems(items):
    """Start the children of the other backends first, then what takes longest.

    In one process, ask the children last.
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ

    def order(item):
        if item.originalname.endswith("other_backends_start"):
            return -2
        if item.originalname.endswith("on_another_backend"):
            return 1 if alone else -2
        return -1 if item.path.name in LONGEST else 0

    items.sort(key=order)


def pytest_collection_finish():
    """What is imported is no garbage: a fifth of the time went into looking at it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


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
        y = ask(model, list(arrays))
        assert tuple(y.shape) == (arrays[0].shape[0], *model.output_shape[1:])

        copy = type(layer).from_config(layer.get_config())
        assert copy.get_config() == layer.get_config()

        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(ask(loaded, list(arrays)), y)

        config = {**layer.get_config(), "dtype": "mixed_bfloat16"}
        half = type(layer).from_config(config)
        assert keras.backend.standardize_dtype(half(*arrays).dtype) == "bfloat16"
        assert all(w.dtype == "float32" for w in half.trainable_weights)
        return y

    return check


def to_numpy(x):
    return keras.ops.convert_to_numpy(x)


def ask(model, x):
    """What a model answers; JAX compiles it whole, which is quicker than op by op."""
    if keras.backend.backend() == "jax":
        return model.predict_on_batch(x)
    return to_numpy(model(x))
