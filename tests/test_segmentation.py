import keras
import numpy as np
import pytest
from conftest import first

from keras_vit import CPVT, PCPVT, SemanticFPN, ViT, feature_pyramid
from keras_vit.segmentation import Upsample


def draw(*shape):
    return np.random.default_rng(0).uniform(0, 255, size=shape).astype("float32")


def backbone(kind, **kwargs):
    if kind == "PCPVT":
        sizes = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
        return PCPVT("small", depths=(1, 1, 1, 1), num_classes=0, **sizes, **kwargs)
    plain = {"patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2, **kwargs}
    if kind == "ViT":
        return ViT("tiny", **{"image_size": None, "num_classes": 0, **plain})
    return CPVT("tiny", pool="mean", peg_positions=(0, 1), **plain)


KINDS = ("PCPVT", "ViT", "CPVT")


@pytest.mark.parametrize("sides", [(4, 6), (3, 5)])
def test_upsample_is_bilinear_and_cut_to_size(check_layer, sides):
    x, like = draw(2, 2, 3, 4), draw(2, *sides, 1)
    y = check_layer(Upsample(2), x, like)
    weights = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]  # half-pixel centres
    rows = np.einsum("ab,nbwd->nawd", weights, x)
    np.testing.assert_allclose(y[:, :, 0], rows[:, : sides[0], 0], rtol=1e-4)


@pytest.mark.parametrize("kind, stride", [("PCPVT", 4), ("ViT", 2), ("CPVT", 2)])
def test_a_pyramid_has_four_maps_each_half_the_one_before(kind, stride):
    pyramid = feature_pyramid(backbone(kind, image_size=(64, 96)))
    sides = [tuple(x.shape[1:3]) for x in pyramid.outputs]
    assert sides == [(64 // stride // 2**i, 96 // stride // 2**i) for i in range(4)]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_gets_logits_at_any_size(kind):
    model = SemanticFPN(backbone(kind), 5, channels=16)
    x = draw(2, 50, 37, 3)
    logits = model.predict_on_batch(x)
    assert logits.shape == (2, 50, 37, 5) and logits.dtype == "float32"
    assert model.output_shape == (None, None, None, 5)
    changed = x.copy()
    changed[:, -1, -1] = 255 - changed[:, -1, -1]  # the last pixel is not cut off
    assert np.abs(model.predict_on_batch(changed) - logits)[:, -1, -1].max() > 1e-6


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["PCPVT", first("ViT"), first("CPVT")])
def test_save_and_load_is_bit_equal_in_safe_mode(tmp_path, kind):
    model = SemanticFPN(backbone(kind), 5, channels=16)
    x = draw(2, 40, 56, 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), model.predict_on_batch(x))


@pytest.mark.heavy
@pytest.mark.parametrize("policy", ["mixed_bfloat16", first("mixed_float16")])
def test_mixed_precision_has_float32_logits(policy):
    x = draw(1, 50, 37, 3)
    single = SemanticFPN(backbone("PCPVT"), 5, channels=16)
    keras.config.set_dtype_policy(policy)
    half = SemanticFPN(backbone("PCPVT"), 5, channels=16)
    half.set_weights(single.get_weights())
    logits = half.predict_on_batch(x)
    assert half.get_layer("fpn0_output").compute_dtype == policy.removeprefix("mixed_")
    assert logits.dtype == "float32"
    expected = single.predict_on_batch(x)
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 0 < difference < 0.1


@pytest.mark.slow
def test_fit_learns_where_the_object_is():
    rng = np.random.default_rng(0)
    x = np.zeros((16, 32, 32, 3), "float32")
    y = np.zeros((16, 32, 32), "int32")
    for i in range(16):
        top, left = rng.integers(0, 20, 2)
        x[i, top : top + 12, left : left + 12] = 255
        y[i, top : top + 12, left : left + 12] = 1 + i % 2
        x[i, ..., 1] *= i % 2
    model = SemanticFPN(backbone("PCPVT", image_size=32), 3, channels=16)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss)
    losses = model.fit(x, y, epochs=12, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_the_head_of_the_backbone_is_left_out():
    model = SemanticFPN(backbone("PCPVT"), 5, channels=16)
    assert not any(v.path.startswith(("norm/", "pool")) for v in model.weights)
    assert model.get_layer("head").output.shape[-1] == 5


def test_wrong_backbones_are_refused():
    other = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    with pytest.raises(ValueError, match="The backbone must be a model of keras_vit"):
        SemanticFPN(other, 3)
    with pytest.raises(ValueError, match=r"patch_size must be a multiple of 4.* got 2"):
        feature_pyramid(ViT("tiny", image_size=8, patch_size=2, depth=1))
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        SemanticFPN(backbone("ViT"), 0)
