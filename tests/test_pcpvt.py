from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy

from keras_vit import PCPVT, from_checkpoint

GOLDEN = Path(__file__).parent / "golden" / "timm_twins_pcpvt.npz"
SMALL = {
    "embed_dims": (16, 32, 40, 64),
    "depths": (2, 2, 2, 1),
    "num_classes": 7,
    "normalization": None,
}


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


# Meituan-AutoML/Twins: the training logs, and timm.
@pytest.mark.first
@pytest.mark.parametrize(
    "variant, expected",
    [("small", 24_106_216), ("base", 43_828_456), ("large", 60_989_672)],
)
def test_parameter_count(variant, expected):
    with keras.StatelessScope(initialize_variables=False):
        model = PCPVT(variant)
        number = sum(np.prod(v.shape) for v in model.trainable_variables)
    keras.utils.clear_session()
    assert number == expected


@pytest.mark.parametrize("image_size", [64, None])
def test_outputs_equal_timm(image_size):
    golden = np.load(GOLDEN)
    told = {"num_heads": (1, 2, 5, 8), "normalization": None}
    model = from_checkpoint(GOLDEN, image_size=image_size, **told)
    images = golden["images_nhwc"]
    both = keras.Model(model.input, [model.get_layer("norm").output, model.output])
    features, logits = both.predict_on_batch(images)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    np.testing.assert_allclose(features, golden["features"], atol=1e-4)


@pytest.mark.heavy
def test_stages_are_maps_of_strides_4_8_16_32():
    model = PCPVT("small", **SMALL)
    maps = [model.get_layer(f"stage{i}").output for i in range(4)]
    backbone = keras.Model(model.input, maps)
    shapes = [x.shape for x in backbone.predict_on_batch(draw(1, 64, 96, 3))]
    assert shapes == [(1, 16, 24, 16), (1, 8, 12, 32), (1, 4, 6, 40), (1, 2, 3, 64)]


@pytest.mark.heavy
def test_sizes_that_do_not_divide_are_padded_never_cropped():
    model = PCPVT("small", **SMALL)
    maps = [model.get_layer(f"stage{i}").output for i in range(4)]
    backbone = keras.Model(model.input, maps)
    x = draw(1, 50, 37, 3)
    shapes = [x.shape[1:3] for x in backbone.predict_on_batch(x)]
    assert shapes == [(13, 10), (7, 5), (4, 3), (2, 2)]
    changed = x.copy()
    changed[:, -1, -1] += 5  # the last pixel counts
    logits = model.predict_on_batch(x)
    assert np.abs(model.predict_on_batch(changed) - logits).max() > 1e-5
    padded = np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)))
    np.testing.assert_allclose(model.predict_on_batch(padded), logits, atol=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize("kwargs", [{}, {"image_size": (64, 32), "dropout": 0.1}])
def test_save_and_load_is_bit_equal_in_safe_mode(tmp_path, kwargs):
    model = PCPVT("small", drop_path_rate=0.1, **SMALL, **kwargs)
    x = draw(2, 64, 32, 3)
    model.save(tmp_path / "pcpvt.keras")
    loaded = keras.saving.load_model(tmp_path / "pcpvt.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), model.predict_on_batch(x))


def test_drop_path_grows_over_all_blocks():
    model = PCPVT("small", drop_path_rate=0.6, **SMALL)
    blocks = [x for x in model.layers if "_block" in x.name]
    rates = [block.drop_path.rate for block in blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.6, 7))


@pytest.mark.slow
def test_fit_lowers_the_loss_in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    sizes = {**SMALL, "depths": (1, 1, 1, 1), "num_classes": 4}
    model = PCPVT("small", image_size=32, **sizes)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    x, y = draw(8, 32, 32, 3), np.arange(8) % 4
    losses = model.fit(x, y, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    assert model.predict(x, verbose=0).dtype == "float32"


def test_without_peg_nothing_else_changes():
    with_peg, without = (PCPVT("small", peg=x, **SMALL) for x in (True, False))
    names = {v.path for v in with_peg.weights} - {v.path for v in without.weights}
    pegs = [f"stage{i}_peg/{name}" for i in range(4) for name in ("kernel", "bias")]
    assert names == set(pegs)


@pytest.mark.heavy
def test_initialisation_is_that_of_twins():
    model = PCPVT("small", depths=(1, 1, 1, 1))
    peg = to_numpy(model.get_layer("stage3_peg").kernel)
    np.testing.assert_allclose(peg.std(), np.sqrt(2 / 9), rtol=0.05)
    patches = to_numpy(model.get_layer("stage3_patches").project.kernel)
    np.testing.assert_allclose(patches.std(), np.sqrt(2 / (4 * 512)), rtol=0.02)
    head = to_numpy(model.get_layer("head").kernel)
    np.testing.assert_allclose(head.std(), 0.02, rtol=0.02)


def test_wrong_arguments_are_refused():
    with pytest.raises(
        ValueError, match=r"multiple of 32, such as \(64, 64\), or None"
    ):
        PCPVT("small", image_size=72)
    with pytest.raises(
        ValueError, match=r"depths must have one value for each of the 4"
    ):
        PCPVT("small", depths=(1, 2))
    with pytest.raises(ValueError, match=r"got 'embed_dim'. Did you mean 'embed_dims'"):
        PCPVT("small", embed_dim=64)
