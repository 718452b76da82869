import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import RelativePositionBias, RotaryPosition, SelfAttention


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_rotary_turns_complex_numbers(check_layer, num_prefix):
    x, grid = draw(2, 3, num_prefix + 15, 8), draw(2, 3, 5, 4)
    y = check_layer(RotaryPosition(), x, grid)
    np.testing.assert_allclose(y[:, :, :num_prefix], x[:, :, :num_prefix], atol=1e-6)
    expected = reference.rotary(x[1, 2, num_prefix:], 3, 5)
    np.testing.assert_allclose(y[1, 2, num_prefix:], expected, atol=1e-5)


def test_a_rotary_product_knows_the_distance_alone():
    query, key = draw(8), draw(8, seed=1)
    grid = draw(1, 6, 7, 4)
    layer = RotaryPosition()

    def at_every_place(x):
        turned = layer(np.broadcast_to(x, (1, 1, 42, 8)).copy(), grid)
        return to_numpy(turned).reshape(6, 7, 8)

    queries, keys = at_every_place(query), at_every_place(key)
    product = queries[1, 2] @ keys[3, 1]
    np.testing.assert_allclose(queries[2, 6] @ keys[4, 5], product, rtol=1e-4)
    assert abs(queries[2, 6] @ keys[4, 4] - product) > 1e-3


@pytest.mark.parametrize("num_prefix", [0, 2])
def test_relative_bias_is_the_equation(check_layer, num_prefix):
    layer = RelativePositionBias(4, hidden_dim=16)
    tokens, grid = draw(1, num_prefix + 6, 8), draw(1, 2, 3, 8)
    bias = check_layer(layer, tokens, grid)
    expected = reference.relative_bias(2, 3, *layer.get_weights())
    np.testing.assert_allclose(
        bias[0, :, num_prefix:, num_prefix:], expected, atol=1e-5
    )
    assert np.all(bias[:, :, :num_prefix] == 0)
    assert np.all(bias[:, :, :, :num_prefix] == 0)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_attention_with_a_position(check_layer, position, rate):
    layer = SelfAttention(2, position=position, attention_dropout=rate)
    tokens, grid = draw(2, 1 + 6, 8), draw(2, 2, 3, 8)
    y = check_layer(layer, tokens, grid)
    if position == "relative":
        bias = to_numpy(layer.bias(tokens, grid))[0]
        turn = lambda x: x  # noqa: E731
    else:
        bias = np.zeros((2, 7, 7))
        turn = lambda x: np.concatenate([x[:1], reference.rotary(x[1:], 2, 3)])  # noqa: E731
    qkv = tokens[0] @ to_numpy(layer.qkv.kernel)
    query, key, value = np.split(qkv, 3, axis=-1)
    heads = []
    for h in range(2):
        s = slice(4 * h, 4 * h + 4)
        logits = turn(query[:, s]) @ turn(key[:, s]).T / 2 + bias[h]
        heads.append(np.stack([reference.softmax(row) for row in logits]) @ value[:, s])
    expected = np.concatenate(heads, -1) @ to_numpy(layer.project.kernel)
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    trained = to_numpy(layer(tokens, grid, training=True))
    assert (np.abs(trained - y).max() > 1e-3) == bool(rate)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="position must be 'relative', 'rotary' or"):
        SelfAttention(2, position="learned")
    with pytest.raises(ValueError, match=r"must be a multiple of 4 .* got d=6"):
        SelfAttention(2, position="rotary")(
            keras.Input((6, 12)), keras.Input((2, 3, 12))
        )
