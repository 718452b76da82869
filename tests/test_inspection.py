"""Attention of models as they are: against NumPy, on every backend."""

import keras
import numpy as np
import pytest
from conftest import to_numpy

import keras_vit
from keras_vit import CPVT, PCPVT, LVViT, SemanticFPN, ViT
from keras_vit.inspection import rollout

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
SIZE = (32, 48)  # a grid of 4 x 6 patches
PYRAMID = {"embed_dims": (8, 16, 20, 24), "depths": (1, 2, 1, 1), "num_classes": 5}
MODELS = {
    "registers": lambda: vit(num_registers=2),
    "mean": lambda: vit(pool="mean", num_registers=1),
    "probe": lambda: vit(pool="attention"),
    "normalised": lambda: vit(qk_norm=True, layer_scale=0.1),
    "relative": lambda: vit(position="relative"),
    "rotary": lambda: vit(position="rotary"),
    "distilled": lambda: vit("deit_tiny_distilled"),
    "cpvt": lambda: CPVT("tiny", image_size=SIZE, patch_size=8, **SMALL),
    "lvvit": lambda: LVViT(
        "tiny", image_size=SIZE, patch_size=8, stem_width=8, **SMALL
    ),
    "pcpvt": lambda: PCPVT(
        "small", image_size=(32, 64), num_heads=(1, 2, 2, 2), **PYRAMID
    ),
}


def some(*quick):
    """All models, the pyramid last; but for these with the heavy tests."""
    marks = {name: () if name in quick else pytest.mark.heavy for name in MODELS}
    return [pytest.param(name, marks=marks[name]) for name in MODELS]


def vit(variant="tiny", **changes):
    options = {"image_size": SIZE, "patch_size": 8, **SMALL, **changes}
    return ViT(variant, **options)


def spread(model):
    """Weights of a trained model's size: fresh ones attend evenly."""
    random = np.random.default_rng(1)
    for weight in model.weights:
        if "seed" not in weight.path and weight.dtype.startswith("float"):
            noise = random.normal(0, 0.3, weight.shape)
            weight.assign(to_numpy(weight) + noise.astype("float32"))
    return model


def pictures(model, batch=2):
    height, width = (side or 40 for side in model.input_shape[1:3])
    shape = (batch, height, width, 3)
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def ask(model, images):
    """All outputs of a model, as NumPy arrays."""
    outputs = model(keras.ops.convert_to_tensor(images), training=False)
    return keras.tree.map_structure(to_numpy, outputs)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def weights_of(model, block, images):
    """softmax(q k^T / sqrt(d)) in NumPy, of the model's own queries and keys."""
    layer, attention = model.get_layer(block), model.get_layer(block).attention
    given = layer._inbound_nodes[0].input_tensors
    tokens, *grid = keras.tree.flatten(
        ask(keras.Model(model.input, list(given)), images)
    )
    x = layer.norm1(keras.ops.convert_to_tensor(tokens))
    batch, heads = len(images), attention.num_heads

    def split(x, parts):
        x = to_numpy(x).astype("float64").reshape(batch, -1, parts, heads, width)
        return x.transpose(2, 0, 3, 1, 4)

    width = tokens.shape[-1] // heads
    if hasattr(attention, "key_value"):
        query = split(attention.query(x), 1)[0]
        reduced = attention._reduce(x, keras.ops.convert_to_tensor(grid[0]))
        key = split(attention.key_value(reduced), 2)[0]
    else:
        query, key, _ = split(attention.qkv(x), 3)
        if attention.qk_norm:
            norms = attention.query_norm, attention.key_norm
            query, key = (
                to_numpy(norm(keras.ops.convert_to_tensor(v.astype("float32"))))
                for norm, v in zip(norms, (query, key), strict=True)
            )
    bias = 0.0
    if getattr(attention, "rotary", None) is not None:
        query, key = (
            to_numpy(attention.rotary(v.astype("float32"), grid[0]))
            for v in (query, key)
        )
    if getattr(attention, "bias", None) is not None:
        bias = to_numpy(attention.bias(x, grid[0]))
    return softmax(query @ key.transpose(0, 1, 3, 2) * width**-0.5 + bias)


@pytest.mark.parametrize("name", some("registers", "rotary", "pcpvt"))
def test_attention_is_the_softmax_of_the_models_own_queries_and_keys(name):
    model = spread(MODELS[name]())
    images = pictures(model)
    maps = keras_vit.attention_maps(model, images)
    blocks = [x.name for x in model.layers if "block" in x.name]
    assert list(maps) == blocks + ["pool"] * (name == "probe")
    for block in blocks:
        expected = weights_of(model, block, images)
        np.testing.assert_allclose(maps[block], expected, atol=1e-5)
    for weights in maps.values():
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert max(weights.max() for weights in maps.values()) > 0.2  # not all even


def test_to_look_changes_nothing_and_batches_are_put_together(monkeypatch):
    model = spread(MODELS["registers"]())
    images = pictures(model, batch=5)
    before = ask(model, images)
    whole = keras_vit.attention_maps(model, images)
    monkeypatch.setattr("keras_vit.inspection.BATCH", 2)
    for name, weights in keras_vit.attention_maps(model, images).items():
        np.testing.assert_allclose(weights, whole[name], atol=1e-5)
    np.testing.assert_array_equal(ask(model, images), before)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_shows_its_own_attention(policy):
    model = spread(MODELS["registers"]())
    whole = keras_vit.attention_maps(model, pictures(model))
    keras.config.set_dtype_policy(policy)
    half = MODELS["registers"]()
    half.set_weights(model.get_weights())
    maps = keras_vit.attention_maps(half, pictures(model))
    for weights in maps.values():
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    found, expected = maps["block0"], whole["block0"]
    assert 0 < np.abs(found - expected).mean() < 0.02


@pytest.mark.heavy
def test_a_quantized_model_shows_its_attention():
    model = spread(MODELS["registers"]())
    images = pictures(model)
    before = keras_vit.attention_maps(model, images)
    model.quantize("int8")
    after = keras_vit.attention_maps(model, images)
    for name, weights in after.items():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        assert 0 < np.abs(weights - before[name]).mean() < 0.05


def definition(maps):
    """Rollout, a number at a time."""
    result = []
    for i in range(len(maps[0])):
        flow = np.eye(maps[0].shape[-1])
        for weights in maps:
            mean = sum(weights[i, a].astype("float64") for a in range(3)) / 3
            step = mean + np.eye(len(mean))
            for row in step:
                row /= row.sum()
            flow = step @ flow
        result.append(flow)
    return np.stack(result)


@pytest.mark.parametrize("name", ["registers", "mean", "probe", "lvvit"])
def test_rollout_is_the_definition_on_four_by_six_patches(name):
    model = spread(MODELS[name]())
    images = pictures(model)
    maps = keras_vit.attention_maps(model, images)
    pool = maps.pop("pool", None)
    flow = definition(list(maps.values()))
    np.testing.assert_allclose(rollout(maps.values()), flow, atol=1e-12)
    prefix = flow.shape[-1] - 24
    if name == "probe":
        probe = pool[:, :, 0].mean(1)  # (B, N)
        row = np.stack([p @ f for p, f in zip(probe, flow, strict=True)])
    else:
        row = flow[:, prefix:].mean(1) if name == "mean" else flow[:, 0]
    row = row[:, prefix:]
    expected = (row / row.max(1, keepdims=True)).reshape(2, 4, 6)
    found = keras_vit.attention_rollout(model, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.max() == 1 and found.min() < 0.9


@pytest.mark.parametrize("name", ["registers", "mean", "probe"])
def test_the_answer_attends_by_the_row_that_the_head_reads(name):
    model = spread(MODELS[name]())
    images = pictures(model)
    maps = keras_vit.attention_maps(model, images)
    last = maps["block2"]
    expected = {
        "registers": last[:, :, 0, 3:],
        "mean": last[:, :, 1:, 1:].mean(2),
        "probe": maps.get("pool", last)[:, :, 0],
    }[name]
    found = keras_vit.class_attention(model, images)
    np.testing.assert_allclose(found, expected.reshape(2, 3, 4, 6), atol=1e-6)
    first = keras_vit.class_attention(model, images, 0)
    assert first.shape == found.shape and np.abs(first - found).max() > 1e-3


def test_the_distance_is_the_mean_over_patches_in_pixels():
    model = spread(MODELS["registers"]())
    images = pictures(model)
    weights = keras_vit.attention_maps(model, images)["block1"][:, :, 3:, 3:]
    places = [(8 * y, 8 * x) for y in range(4) for x in range(6)]
    for normalize in (True, False):
        total = np.zeros(3)
        for b in range(2):
            for a in range(3):
                for i, (y, x) in enumerate(places):
                    row = weights[b, a, i].astype("float64")
                    row = row / row.sum() if normalize else row
                    far = [np.hypot(y - v, x - u) for v, u in places]
                    total[a] += row @ far / (2 * len(places))
        found = keras_vit.attention_distance(model, images, normalize)
        assert found.shape == (3, 3)
        np.testing.assert_allclose(found[1], total, rtol=1e-5)


@pytest.mark.heavy
def test_what_is_built_on_a_model_is_looked_into_too():
    model = SemanticFPN(MODELS["cpvt"](), 3, channels=8)
    images = pictures(model)
    assert set(keras_vit.attention_maps(model, images)) == {
        "block0",
        "block1",
        "block2",
    }
    grid = ask(keras_vit.features(model, "peg0"), images)["peg0"]
    assert grid.shape == (2, 4, 6, 24)
    with pytest.raises(ValueError, match=r"normalize must be False .* no LayerNorm"):
        keras_vit.features(model, "peg0", normalize=True)


@pytest.mark.first
def test_without_a_pool_the_patches_are_what_is_read():
    model = spread(SemanticFPN(MODELS["registers"](), 3, channels=8))
    images = pictures(model)
    maps = keras_vit.attention_maps(model, images)
    expected = maps["block2"][:, :, 3:, 3:].mean(2).reshape(2, 3, 4, 6)
    found = keras_vit.class_attention(model, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    row = definition(list(maps.values()))[:, 3:, 3:].mean(1)
    expected = (row / row.max(1, keepdims=True)).reshape(2, 4, 6)
    found = keras_vit.attention_rollout(model, images)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.first
def test_with_two_heads_both_tokens_are_read():
    model = spread(MODELS["distilled"]())
    images = pictures(model)
    last = keras_vit.attention_maps(model, images)["block2"]
    expected = (last[:, :, 0, 2:] + last[:, :, 1, 2:]) / 2
    found = keras_vit.class_attention(model, images)
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-6)


@pytest.mark.first
def test_a_size_that_patches_do_not_divide_has_the_padded_grid():
    model = spread(vit(image_size=None, position="rotary"))
    images = pictures(model)[:, :21, :29]
    assert keras_vit.attention_rollout(model, images).shape == (2, 3, 4)
    assert keras_vit.class_attention(model, images, 0).shape == (2, 3, 3, 4)
    assert keras_vit.attention_distance(model, images).shape == (3, 3)


@pytest.mark.first
def test_what_holds_a_model_is_not_looked_through():
    model = MODELS["mean"]()
    images = pictures(model)
    twice = keras.layers.Average()([model(model.input), model(model.input)])
    for other in (
        keras.Sequential([keras.Input(images.shape[1:]), model]),
        keras.Model(model.input, twice),
    ):
        for function in (
            keras_vit.attention_maps,
            keras_vit.class_attention,
            keras_vit.attention_rollout,
            keras_vit.position_similarity,
        ):
            with pytest.raises(ValueError, match=r"holds its blocks itself, .* once"):
                function(other, images)
        with pytest.raises(ValueError, match=r"one within another is model.get_layer"):
            keras_vit.features(other)


# --- what is refused ---


@pytest.mark.first
def test_what_is_not_defined_is_refused_with_the_reason():
    model = MODELS["pcpvt"]()
    images = pictures(model)
    for function in (
        keras_vit.attention_rollout,
        keras_vit.class_attention,
        keras_vit.attention_distance,
    ):
        with pytest.raises(ValueError, match=r"keys that are the queries, so .* none"):
            function(model, images)


@pytest.mark.first
def test_images_of_another_size_and_layers_that_are_not_there_are_refused():
    model = MODELS["registers"]()
    with pytest.raises(ValueError, match=r"images must be \(B, 32 x 48 x 3\) for .*"):
        keras_vit.attention_maps(model, np.zeros((1, 48, 32, 3)))
    with pytest.raises(ValueError, match=r"one image alone is images\[None\]"):
        keras_vit.attention_maps(model, np.zeros((32, 48, 3)))
    with pytest.raises(ValueError, match=r"layers must be in 0\.\.2, the blocks of"):
        keras_vit.features(model, 3)
    with pytest.raises(ValueError, match=r"got 'blok1'. Did you mean 'block1'?"):
        keras_vit.features(model, "blok1")
    with pytest.raises(ValueError, match="format must be one of 'grid', 'tokens'"):
        keras_vit.features(model, 0, "map")
    with pytest.raises(
        ValueError, match=r"prefix must be False for .* no prefix tokens"
    ):
        keras_vit.features(vit(pool="mean"), 0, prefix=True)
    dense = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match="must be a model of keras_vit that holds"):
        keras_vit.attention_maps(dense, np.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"at least one, got \(0, 32, 48, 3\)"):
        keras_vit.attention_maps(model, np.zeros((0, 32, 48, 3)))
    for block in ("norm", "patches"):
        with pytest.raises(ValueError, match="block must be one that attends"):
            keras_vit.class_attention(model, pictures(model), block)
    with pytest.raises(ValueError, match=r"block must be in 0\.\.2"):
        keras_vit.class_attention(model, pictures(model), 3)
    with pytest.raises(ValueError, match="prefix must be False for 'patches'"):
        keras_vit.features(model, "patches", prefix=True)
    with pytest.raises(ValueError, match="normalize must be False for 'norm'"):
        keras_vit.features(model, "norm", normalize=True)
