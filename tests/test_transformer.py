import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import (
    MLP,
    AttentionPool,
    LayerScale,
    MeanPool,
    SelfAttention,
    TokenPool,
    TransformerBlock,
)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    "layer, expected",
    [
        (TransformerBlock(3, drop_path=0.5, layer_scale=0.1, qk_norm=True), (2, 7, 12)),
        (SelfAttention(3, qkv_bias=False, dropout=0.1), (2, 7, 12)),
        (MLP(48 / 11, gelu="tanh"), (2, 7, 12)),
        (MLP(gelu="quick"), (2, 7, 12)),
        (LayerScale(), (2, 7, 12)),
        (TokenPool(1), (2, 12)),
        (MeanPool(2), (2, 12)),
        (AttentionPool(3, num_prefix=2), (2, 12)),
    ],
    ids=lambda x: x.name if isinstance(x, keras.Layer) else None,
)
def test_layer(check_layer, layer, expected):
    assert check_layer(layer, draw(2, 7, 12)).shape == expected


def randomize(layer):
    """Give every weight, biases too, a value that shows in the output."""
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(0, 0.3, w.shape) for w in layer.get_weights()])


def weights_by_path(layer):
    return {
        v.path.split("/", 1)[1]: to_numpy(v.value) for v in layer.trainable_variables
    }


@pytest.mark.parametrize("gelu", ["exact", "tanh", "quick"])
def test_block_is_equations_2_and_3(gelu):
    layer = TransformerBlock(3, mlp_ratio=2.5, layer_scale=0.5, gelu=gelu, name="b")
    x = draw(1, 7, 12)
    layer(x)
    randomize(layer)
    w = weights_by_path(layer)

    def dense(name, x):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    def norm(name, x):
        return reference.layer_norm(x, w[f"{name}/gamma"], w[f"{name}/beta"])

    z = x[0]
    q, k, v = np.split(dense("attention/qkv", norm("norm1", z)), 3, axis=-1)
    y = dense("attention/project", reference.attention(q, k, v, 3))
    z = z + w["scale1/gamma"] * y
    y = reference.gelu(dense("mlp/expand", norm("norm2", z)), gelu)
    z = z + w["scale2/gamma"] * dense("mlp/reduce", y)
    assert w["mlp/expand/kernel"].shape == (12, 30)
    np.testing.assert_allclose(to_numpy(layer(x))[0], z, atol=2e-5)


def test_qk_norm_makes_attention_blind_to_the_scale_of_its_queries():
    layer = SelfAttention(2, qk_norm=True)
    x = draw(1, 5, 8)
    y = to_numpy(layer(x))
    kernel = layer.qkv.kernel
    scale = np.r_[np.full(16, 50.0), np.ones(8)]  # queries and keys
    kernel.assign(to_numpy(kernel.value) * scale)
    np.testing.assert_allclose(to_numpy(layer(x)), y, atol=1e-4)


def test_attention_pool_asks_the_patch_tokens_with_its_probe():
    layer = AttentionPool(3, num_prefix=2, mlp_ratio=2, name="p")
    x = draw(1, 7, 12)
    layer(x)
    randomize(layer)
    w = weights_by_path(layer)

    def dense(name, x):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    k, v = np.split(dense("key_value", x[0, 2:]), 2, axis=-1)
    y = reference.attention(dense("query", w["probe"][0]), k, v, 3)
    y = dense("project", y)
    z = reference.layer_norm(y, w["norm/gamma"], w["norm/beta"])
    y = y + dense("mlp/reduce", reference.gelu(dense("mlp/expand", z)))
    np.testing.assert_allclose(to_numpy(layer(x)), y, atol=2e-5)


def test_mean_pool_leaves_prefix_tokens_out():
    x = draw(2, 7, 12)
    np.testing.assert_allclose(to_numpy(MeanPool(3)(x)), x[:, 3:].mean(1), atol=1e-6)


def test_drop_path_skips_whole_samples():
    x = np.ones((64, 3, 4), "float32")
    y = to_numpy(TransformerBlock(2, drop_path=0.5).drop_path(x, training=True))
    assert set(np.unique(y)) == {0.0, 2.0}
    assert (y == y[:, :1, :1]).all()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("attention_dropout", [0.0, 1e-9])
def test_softmax_is_float32_under_mixed_precision(policy, attention_dropout):
    """In half precision the many small weights of this row would vanish or round.

    One key stands out by 11 nats of 4096: exactly, it gets 0.936 of the weight.
    """
    layer = SelfAttention(
        1, qkv_bias=False, attention_dropout=attention_dropout, dtype=policy
    )
    x = np.zeros((1, 4096, 2), "float32")
    x[0, :, 0] = 1.0
    x[0, 0] = (1.0, 11.0)
    layer.build(x.shape)
    qkv = np.zeros((2, 6), "float32")
    qkv[0, 0] = np.sqrt(2.0)  # every query: (sqrt 2, 0)
    qkv[1, 2] = qkv[1, 4] = 1.0  # key and value: second channel
    layer.set_weights([qkv, np.eye(2, dtype="float32"), np.zeros(2, "float32")])
    y = to_numpy(keras.ops.cast(layer(x, training=True), "float32"))
    weight = np.exp(11) / (np.exp(11) + 4095)
    np.testing.assert_allclose(y[0, 1, 0], 11 * weight, rtol=1e-2)


@pytest.mark.parametrize("rate", ["dropout", "attention_dropout", "drop_path"])
def test_each_rate_acts_in_training_only(rate):
    layer = TransformerBlock(2, initialization="timm", **{rate: 0.5})
    x = draw(4, 5, 8)
    inference = to_numpy(layer(x, training=False))
    np.testing.assert_array_equal(to_numpy(layer(x)), inference)
    assert np.abs(to_numpy(layer(x, training=True)) - inference).max() > 1e-6


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_heads=5 must divide D, got D=12"):
        SelfAttention(5)(draw(1, 7, 12))
    with pytest.raises(ValueError, match="num_heads=5 must divide D, got D=12"):
        AttentionPool(5)(draw(1, 7, 12))
    match = "gelu must be 'exact', 'tanh' or 'quick', got 'erf'"
    with pytest.raises(ValueError, match=match):
        TransformerBlock(3, gelu="erf")
    with pytest.raises(ValueError, match="initialization must be one of 'jax'"):
        MLP(initialization="torch")(draw(1, 7, 12))
