from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy

from keras_vit import LVViT, SemanticFPN, from_checkpoint

CHECKPOINT = Path(__file__).parent / "golden" / "lvvit.npz"
GOLDEN = np.load(CHECKPOINT)
SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}


def small(**kwargs):
    return LVViT("small", **{"image_size": 32, "num_classes": 7, **SMALL, **kwargs})


def published_model(**kwargs):
    """The model of the golden file, with its weights."""
    told = {"num_heads": 2, "residual_scale": 2.0, "normalization": None}
    return from_checkpoint(CHECKPOINT, **told, **kwargs)


def images(size=32, batch=2):
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (batch, size, size, 3)).astype("float32")


# The figures of the paper's code, both heads included.
@pytest.mark.first
@pytest.mark.parametrize(
    "variant, image_size, expected",
    [
        ("tiny", 224, 8_534_720),
        ("small", 224, 26_151_824),
        ("medium", 224, 55_830_544),
        ("large", 224, 150_021_968),
        ("small", 384, 26_297_744),
        ("medium", 448, 56_131_600),
        ("large", 512, 150_657_872),
    ],
)
def test_parameter_count(variant, image_size, expected):
    with keras.StatelessScope(initialize_variables=False):  # nothing is allocated
        model = LVViT(variant, image_size=image_size)
        count = sum(np.prod(v.shape) for v in model.trainable_variables)
    keras.utils.clear_session()  # or Keras would initialise them after all
    assert count == expected


def test_outputs_equal_the_published_code():
    model = published_model()
    names = ("logits", "norm", "head", "token_head")
    nodes = keras.Model(model.input, [model.get_layer(n).output for n in names])
    found = nodes.predict_on_batch(GOLDEN["images_nhwc"])
    keys = ("eval_logits", "eval_features", "eval_cls_logits", "eval_token_logits")
    for x, key in zip(found, keys, strict=True):
        np.testing.assert_allclose(x.reshape(GOLDEN[key].shape), GOLDEN[key], atol=1e-4)


@pytest.mark.heavy
def test_without_token_weight_the_class_head_answers_alone():
    model = small(token_weight=0)
    assert "token_head" not in [layer.name for layer in model.layers]
    head = keras.Model(model.input, model.get_layer("head").output)
    x = images()
    np.testing.assert_array_equal(model.predict_on_batch(x), head.predict_on_batch(x))
    assert small().count_params() - model.count_params() == 24 * 7 + 7


@pytest.mark.heavy
def test_any_size_at_run_time_equals_the_model_built_for_that_size(tmp_path):
    """48 pixels are the grid of the table; others resample it, or are padded."""
    model = published_model()
    model.save_weights(tmp_path / "x.weights.h5")
    dynamic = published_model(image_size=None)
    x = GOLDEN["images_nhwc"]
    np.testing.assert_allclose(
        dynamic.predict_on_batch(x), GOLDEN["eval_logits"], atol=1e-4
    )
    padded = np.pad(x[:, :37, :45], ((0, 0), (0, 11), (0, 3), (0, 0)))
    np.testing.assert_allclose(
        dynamic.predict_on_batch(x[:, :37, :45]),
        model.predict_on_batch(padded),
        atol=1e-5,
    )
    wide = published_model(image_size=(48, 80), position_grid=(3, 3))
    y = np.concatenate([x, x[:, :, :32]], axis=2)
    np.testing.assert_allclose(
        dynamic.predict_on_batch(y), wide.predict_on_batch(y), atol=1e-5
    )


@pytest.mark.heavy
def test_save_and_load_is_bit_equal_in_safe_mode(tmp_path):
    model = small(drop_path_rate=0.1)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = images()
    np.testing.assert_array_equal(loaded.predict_on_batch(x), model.predict_on_batch(x))


@pytest.mark.heavy
def test_features_are_the_normalised_class_token():
    y = small(num_classes=0).predict_on_batch(images())
    assert y.shape == (2, 24)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=2e-2)  # epsilon is 1e-5


@pytest.mark.heavy
def test_it_is_a_backbone_of_segmentation():
    model = SemanticFPN(small(num_classes=0, depth=4), 5, channels=8)
    assert model.output_shape == (None, 32, 32, 5)


def test_logits_are_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small()
    names = ("logits", "head", "token_head", "block0")
    dtypes = [model.get_layer(name).output.dtype for name in names]
    assert dtypes == ["float32"] * 3 + ["bfloat16"]


@pytest.mark.heavy
def test_initialisation_is_the_one_of_the_code():
    model = LVViT("small", depth=1, num_classes=10)
    by_path = {v.path: to_numpy(v) for v in model.weights}
    for path in ("tokens/class_token", "position/table", "block0/mlp/expand/kernel"):
        assert by_path[path].std() == pytest.approx(0.02, rel=0.15)
    for path, fan_in in (
        ("patches/convolution1/kernel", 7 * 7 * 3),
        ("patches/convolution2/kernel", 3 * 3 * 64),
        ("patches/project/project/kernel", 8 * 8 * 64),
    ):
        bound = fan_in**-0.5  # uniform, PyTorch's default of a convolution
        assert 0.98 * bound < np.abs(by_path[path]).max() <= bound
    assert not any("qkv/bias" in path for path in by_path)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"variant": "xl"}, "variant must be one of .*'large', got 'xl'"),
        ({"stem": 3}, "An argument must be one of .* got 'stem'"),
        (
            {"patch_size": 15},
            "patch_size must be even for a convolutional stem, got 15",
        ),
        ({"image_size": 40}, "patch_size=16 must divide .* got 40 x 40"),
        ({"token_weight": -1}, "token_weight must be >= 0, got -1"),
        ({"distillation_token": True}, "LV-ViT has no distillation token"),
        ({"residual_scale": 0}, "residual_scale must be positive, got 0"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LVViT(**{"variant": "tiny", "image_size": 32, "depth": 1, **kwargs})
