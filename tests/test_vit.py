from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from conftest import ask, first, to_numpy

from keras_vit import ViT, from_checkpoint
from keras_vit.vit import POSITIONS, VARIANTS

GOLDEN = Path(__file__).parent / "golden"

# Trainable parameters at 224 px, 1000 classes. vit_jax/models_test.py of
# https://github.com/google-research/vision_transformer (commit c6de1e5): tiny/16,
# small/16, small/32, base/8, /16, /32, large/16, /32, huge/14; the others follow from
# the same formula; timm builds tiny, small, base, large, giant and gigantic with them.
PARAMETERS = {
    "tiny": {8: 5_719_720, 14: 5_694_376, 16: 5_717_416, 32: 6_131_560},
    "small": {8: 22_055_272, 14: 22_004_584, 16: 22_050_664, 32: 22_878_952},
    "base": {8: 86_576_872, 14: 86_475_496, 16: 86_567_656, 32: 88_224_232},
    "large": {8: 304_338_920, 14: 304_203_752, 16: 304_326_632, 32: 306_535_400},
    "huge": {8: 632_214_760, 14: 632_045_800, 16: 632_199_400, 32: 634_960_360},
    "giant": {8: 1_012_797_288, 14: 1_012_611_432},
    "gigantic": {8: 1_844_660_328, 14: 1_844_440_680},
    # facebookresearch/deit; at 224 px, distilled ones with the second head
    "deit_tiny_distilled": {16: 5_910_800},
    "deit_small_distilled": {16: 22_436_432},
    "deit_base_distilled": {16: 87_338_192},
    "deit_tiny": {16: 5_717_416},
    "deit_small": {16: 22_050_664},
    "deit_base": {16: 86_567_656},
    "deit3_small": {16: 22_059_496},
    "deit3_medium": {16: 38_849_512},
    "deit3_base": {16: 86_585_320},
    "deit3_large": {16: 304_374_760},
    "deit3_huge": {14: 632_126_440},
}


def count(*args, **kwargs):
    with keras.StatelessScope(initialize_variables=False):  # nothing is allocated
        model = ViT(*args, **kwargs)
        number = sum(np.prod(v.shape) for v in model.trainable_variables)
    keras.utils.clear_session()  # or Keras would initialise them after all
    return number


@pytest.mark.first
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant):
    for patch_size, expected in PARAMETERS[variant].items():
        assert count(variant, patch_size=patch_size) == expected


@pytest.mark.first
@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"variant": "small", "pool": "mean"}, 22_049_896),  # vit_jax models_test.py
        ({"variant": "base", "pool": "mean"}, 86_566_120),
        ({"variant": "small", "image_size": 384}, 22_196_584),
        ({"variant": "base", "image_size": 384}, 86_859_496),
        ({"variant": "deit_base_distilled", "image_size": 384}, 87_630_032),
        ({"variant": "small", "num_registers": 4}, 22_050_664 + 4 * 384),
        # one norm more, and no bias of the patches
        ({"variant": "small", "pre_norm": True}, 22_050_664 + 2 * 384 - 384),
        (
            {"variant": "tiny", "representation_size": 100, "num_classes": 10},
            PARAMETERS["tiny"][16] - 193 * 1000 + 193 * 100 + 101 * 10,
        ),
        (
            {"variant": "tiny", "representation_size": 192},
            PARAMETERS["tiny"][16] + 192 * 192 + 192,
        ),
    ],
)
def test_parameter_count_of_other_forms(kwargs, expected):
    assert count(**kwargs) == expected


@pytest.mark.parametrize("file", ["timm_vit", "timm_deit_distilled"])
def test_outputs_equal_timm(file):
    golden = np.load(GOLDEN / f"{file}.npz")
    told = {"num_heads": 3, "normalization": None}
    model = from_checkpoint(GOLDEN / f"{file}.npz", **told)
    images = golden["images_nhwc"]
    np.testing.assert_allclose(ask(model, images), golden["logits"], atol=1e-4)
    tokens = keras.Model(model.input, model.get_layer("norm").output)
    np.testing.assert_allclose(ask(tokens, images), golden["features"], atol=1e-4)


def small(variant="tiny", **kwargs):
    kwargs = {"image_size": 32, "patch_size": 8, "num_classes": 10, "depth": 2} | kwargs
    return ViT(variant, **kwargs)


def draw(*shape):
    return np.random.default_rng(0).uniform(0, 255, size=shape).astype("float32")


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"pool": "mean", "num_registers": 2},
        {"pool": "attention", "qk_norm": True},
        {"variant": "deit_tiny_distilled", "num_registers": 1, "dropout": 0.1},
        {"variant": "deit3_small", "image_size": (16, 32), "drop_path_rate": 0.1},
        {"image_size": None, "position_grid": (3, 5)},
        first({"variant": "deit_tiny", "pool": "mean", "num_classes": 0}),
        first({"pre_norm": True, "representation_size": 24, "gelu": "quick"}),
        first({"normalization": [[0.1, 0.2, 0.3], (0.4, 0.5, 0.6)]}),
    ],
    ids=str,
)
def test_save_and_load_is_bit_equal_in_safe_mode(tmp_path, kwargs):
    model = small(**kwargs)
    x = draw(2, 16, 32, 3) if kwargs.get("image_size") else draw(2, 32, 32, 3)
    model.save(tmp_path / "vit.keras")
    loaded = keras.saving.load_model(tmp_path / "vit.keras")
    np.testing.assert_array_equal(ask(loaded, x), ask(model, x))


def test_any_size_at_run_time_equals_the_model_built_for_that_size(tmp_path):
    dynamic = small("deit_tiny", image_size=None, position_grid=(4, 4))
    dynamic.save_weights(tmp_path / "any.weights.h5")
    for size in [(32, 32), (16, 64), (40, 24), (56, 72)]:
        fixed = small("deit_tiny", image_size=size)
        fixed.load_weights(tmp_path / "any.weights.h5")
        x = draw(2, *size, 3)
        np.testing.assert_allclose(ask(dynamic, x), ask(fixed, x), atol=1e-4)


def test_any_size_takes_images_that_the_patch_does_not_divide():
    model = small(image_size=None, normalization=None, initialization="deit")
    x = draw(1, 30, 21, 3)
    padded = np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)))
    np.testing.assert_allclose(ask(model, x), ask(model, padded), atol=1e-4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("dropout", [first(0.0), 0.1])
def test_mixed_precision_has_float32_logits_and_a_scaled_loss(policy, dropout):
    keras.config.set_dtype_policy(policy)
    model = small(dropout=dropout, attention_dropout=dropout, drop_path_rate=dropout)
    model.compile("adamw", "sparse_categorical_crossentropy")
    assert "mixed_" + model.get_layer("block0").compute_dtype == policy
    logits = model(draw(2, 32, 32, 3), training=bool(dropout))
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert model.predict(draw(2, 32, 32, 3), verbose=0).dtype == "float32"  # compiled
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")


@pytest.mark.parametrize(
    "pool",  # of the mean: test_every_position_trains_a_step_saves_and_reloads
    ["class", pytest.param("attention", marks=pytest.mark.heavy)],
)
def test_fit_lowers_the_loss(pool):
    x = draw(8, 32, 32, 3)
    y = np.arange(8) % 4
    model = small(pool=pool, num_classes=4, drop_path_rate=0.05)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(1e-3), loss)
    losses = model.fit(x, y, epochs=8, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.5 * losses[0]


def test_distilled_logits_are_the_mean_of_two_heads_that_can_be_cut():
    model = small("deit_tiny_distilled")
    heads = keras.Model(
        model.input, [model.get_layer(name).output for name in ("head", "head_dist")]
    )
    x = draw(2, 32, 32, 3)
    head, head_dist = (to_numpy(y) for y in heads(x))
    assert np.abs(head - head_dist).max() > 1e-3
    np.testing.assert_allclose(ask(model, x), (head + head_dist) / 2, atol=1e-6)


def test_features_are_pooled_and_normalised():
    for kwargs in ({}, {"pool": "mean"}, {"variant": "deit_tiny", "pool": "mean"}):
        features = small(num_classes=0, **kwargs)
        x = to_numpy(features(draw(2, 32, 32, 3)))
        assert x.shape == (2, 192)
    np.testing.assert_allclose(x.mean(-1), 0, atol=1e-4)  # norm_after_pool: last
    np.testing.assert_allclose(x.std(-1), 1, atol=1e-2)


def test_a_representation_is_a_dense_and_a_tanh_between_pooling_and_head():
    model = small(representation_size=24, initialization="deit")
    names = ("pool", "pre_logits", "head")
    nodes = keras.Model(model.input, [model.get_layer(x).output for x in names])
    pooled, found, logits = (to_numpy(x) for x in nodes(draw(2, 32, 32, 3)))
    kernel, bias = model.get_layer("pre_logits").get_weights()
    np.testing.assert_allclose(found, np.tanh(pooled @ kernel + bias), atol=1e-5)
    kernel, bias = model.get_layer("head").get_weights()
    np.testing.assert_allclose(logits, found @ kernel + bias, atol=1e-5)
    features = small(representation_size=24, num_classes=0)
    assert features.output_shape == (None, 24)
    assert features.layers[-1].name == "pre_logits"
    with pytest.raises(ValueError, match="None beside a distillation token, got 24"):
        small("deit_tiny_distilled", representation_size=24)


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_pre_norm_normalises_what_the_first_block_reads(pool):
    model = small("deit_tiny", pre_norm=True, dropout=0.1, epsilon=1e-3, pool=pool)
    names = ("position", "pre_norm")
    assert model.get_layer("dropout").input is model.get_layer("pre_norm").output
    nodes = keras.Model(model.input, [model.get_layer(x).output for x in names])
    before, after = (to_numpy(x) for x in nodes(draw(2, 32, 32, 3)))
    expected = reference.layer_norm(before, 1, 0, epsilon=1e-3)
    np.testing.assert_allclose(after, expected, atol=1e-4)
    assert "pre_norm" in [x.name for x in small(position="none", pre_norm=True).layers]


def test_deit3_class_token_has_no_position_and_drop_path_is_constant():
    model = small("deit3_small", drop_path_rate=0.2, depth=3)
    assert model.get_layer("position").get_weights()[0].shape == (1, 16, 384)
    rates = [model.get_layer(f"block{i}").drop_path.rate for i in range(3)]
    np.testing.assert_allclose(rates, 0.2)
    gamma = to_numpy(model.get_layer("block2").scale2.gamma)
    np.testing.assert_allclose(gamma, 1e-4)
    rates = [
        small(drop_path_rate=0.2, depth=3).get_layer(f"block{i}") for i in range(3)
    ]
    np.testing.assert_allclose([block.drop_path.rate for block in rates], [0, 0.1, 0.2])


def test_initialisation_is_the_one_of_the_row():
    vit, deit = ViT("small", depth=1), ViT("deit_small", depth=1)

    def kernel(model, layer):
        return getattr(model.get_layer("block0").attention, layer).kernel

    bound = np.sqrt(6 / (2 * 384))  # Xavier of each D x D matrix, not of D x 3 D
    qkv = to_numpy(kernel(vit, "qkv"))
    assert 0.99 * bound < np.abs(qkv).max() <= bound
    assert np.all(to_numpy(vit.get_layer("head").kernel) == 0)
    np.testing.assert_allclose(to_numpy(kernel(deit, "qkv")).std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(
        to_numpy(deit.get_layer("head").kernel).std(), 0.02, 0.02
    )
    for initialization, stddev in (("jax", 192**-0.5), ("deit", 0.02)):
        model = small(representation_size=500, initialization=initialization)
        kernel = to_numpy(model.get_layer("pre_logits").kernel)
        np.testing.assert_allclose(kernel.std(), stddev, rtol=0.02)
    patch = to_numpy(deit.get_layer("patches").project.kernel)
    assert 0.99 / np.sqrt(768) < np.abs(patch).max() <= 1 / np.sqrt(768)


def test_a_row_can_be_overridden_and_unknown_names_are_refused():
    model = ViT("small", depth=6, embed_dim=320, num_heads=5, image_size=32)
    assert model.get_layer("norm").output.shape == (None, 5, 320)
    assert len([x for x in model.layers if x.name.startswith("block")]) == 6
    with pytest.raises(ValueError, match=r"got 'embed_dims'. Did you mean 'embed_dim'"):
        ViT("small", embed_dims=320)
    with pytest.raises(ValueError, match=r"'imagesize'. Did you mean 'image_size'"):
        ViT("tiny", imagesize=32)
    with pytest.raises(ValueError, match=r"got 'smal'. Did you mean 'small'"):
        ViT("smal")
    with pytest.raises(ValueError, match="pool must be one of 'class'"):
        ViT("tiny", pool="gap")
    with pytest.raises(ValueError, match="distillation token needs pool='class'"):
        ViT("deit_tiny_distilled", pool="mean")
    with pytest.raises(ValueError, match="image_size must be a positive int"):
        ViT("tiny", image_size=(1, 2, 3))
    with pytest.raises(ValueError, match=r"patch_size=16 must divide .* 40 x 40"):
        ViT("tiny", image_size=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    "position",  # with weights of their own, and with none, on all backends
    [x if x in ("rotary", "relative", "learned_peg") else first(x) for x in POSITIONS],
)
def test_every_position_trains_a_step_saves_and_reloads(tmp_path, position):
    # The mean: no one reads the class token's relative positions in the last block.
    kwargs = {"image_size": None, "pool": "mean", "num_registers": 1, "dropout": 0.1}
    model = small(position=position, **kwargs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adamw", loss)
    before = [to_numpy(v) for v in model.trainable_variables]
    x = draw(4, 32, 24, 3)
    history = model.fit(x, np.arange(4), verbose=0, epochs=2).history
    assert np.isfinite(history["loss"]).all()
    pairs = zip(before, model.trainable_variables, strict=True)
    still = [v.path for old, v in pairs if np.array_equal(old, to_numpy(v))]
    assert still == []  # every variable learns
    model.save(tmp_path / "vit.keras")
    loaded = keras.saving.load_model(tmp_path / "vit.keras")
    np.testing.assert_array_equal(ask(loaded, x), ask(model, x))
    keras.Model(model.input, model.get_layer("block1").output)(x)  # can be cut


@pytest.mark.heavy
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_gives_a_static_size_what_it_gives_a_dynamic_one(
    tmp_path, position
):
    kwargs = {"position": position, "position_grid": (4, 4), "pool": "mean"}
    dynamic = small("deit_tiny", image_size=None, **kwargs)
    dynamic.save_weights(tmp_path / "any.weights.h5")
    fixed = small("deit_tiny", image_size=(32, 24), **kwargs)
    fixed.load_weights(tmp_path / "any.weights.h5")
    x = draw(4, 32, 24, 3)
    np.testing.assert_allclose(ask(dynamic, x), ask(fixed, x), atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
def test_patches_permute_with_the_input_without_a_position_alone(position):
    model = small(position=position, pool="mean")
    tokens = keras.Model(model.input, model.get_layer("block1").output)
    x = draw(1, 32, 32, 3)
    order = np.random.default_rng(1).permutation(16)
    patches = x.reshape(4, 8, 4, 8, 3).transpose(0, 2, 1, 3, 4).reshape(16, 8, 8, 3)
    shuffled = patches[order].reshape(4, 4, 8, 8, 3).transpose(0, 2, 1, 3, 4)
    found = ask(tokens, shuffled.reshape(1, 32, 32, 3))
    difference = np.abs(found - ask(tokens, x)[:, order]).max()
    assert (difference < 1e-4) == (position == "none")


def test_an_unknown_position_is_refused():
    with pytest.raises(ValueError, match=r"got 'sincos'. Did you mean 'sincos_"):
        small(position="sincos")
    with pytest.raises(ValueError, match="must be a multiple of 4 for rotary"):
        small(position="rotary", embed_dim=30, num_heads=3)
