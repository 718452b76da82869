import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import SpatialReductionAttention


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("sr_ratio", [1, 2])
def test_spatial_reduction_is_the_equation(check_layer, sr_ratio):
    layer = SpatialReductionAttention(2, sr_ratio)
    tokens, grid = draw(2, 24, 8), draw(2, 4, 6, 8)
    y = check_layer(layer, tokens, grid)

    def dense(part, x):
        return x @ to_numpy(part.kernel) + to_numpy(part.bias)

    reduced = tokens[0]
    if sr_ratio > 1:
        patches = reference.patches(reduced.reshape(4, 6, 8), sr_ratio)
        gamma, beta = to_numpy(layer.norm.gamma), to_numpy(layer.norm.beta)
        reduced = reference.layer_norm(
            dense(layer.reduce.project, patches), gamma, beta, 1e-5
        )
        assert reduced.shape == (6, 8)
    key, value = np.split(dense(layer.key_value, reduced), 2, axis=-1)
    x = reference.attention(dense(layer.query, tokens[0]), key, value, 2)
    np.testing.assert_allclose(y[0], dense(layer.project, x), atol=1e-5)


def test_a_grid_of_run_time_is_padded_to_whole_reductions():
    tokens, grid = keras.Input((None, 8)), keras.Input((None, None, 8))
    layer = SpatialReductionAttention(2, 2)
    model = keras.Model([tokens, grid], layer(tokens, grid))
    x = draw(1, 15, 8)
    y = to_numpy(model([x, x.reshape(1, 3, 5, 8)]))
    padded = np.pad(x.reshape(3, 5, 8), ((0, 1), (0, 1), (0, 0)))
    patches = reference.patches(padded, 2)
    reduced = patches @ to_numpy(layer.reduce.project.kernel)
    reduced = reduced + to_numpy(layer.reduce.project.bias)
    normalised = to_numpy(layer.norm(reduced[None]))[0]
    query = x[0] @ to_numpy(layer.query.kernel)
    key, value = np.split(normalised @ to_numpy(layer.key_value.kernel), 2, axis=-1)
    expected = reference.attention(query, key, value, 2)
    expected = expected @ to_numpy(layer.project.kernel)
    np.testing.assert_allclose(y[0], expected, atol=1e-5)  # biases start at 0


def test_attention_dropout_acts_in_training_alone():
    tokens, grid = draw(2, 24, 8), draw(2, 4, 6, 8)
    layer = SpatialReductionAttention(2, 2, attention_dropout=0.5)
    still = to_numpy(layer(tokens, grid))
    np.testing.assert_array_equal(to_numpy(layer(tokens, grid)), still)
    assert np.abs(to_numpy(layer(tokens, grid, training=True)) - still).max() > 1e-4


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads=3 must divide D, got D=8"):
        SpatialReductionAttention(3)(draw(1, 6, 8), draw(1, 2, 3, 8))
    with pytest.raises(ValueError, match=r"patch_size=2 must divide .* 3 x 5"):
        SpatialReductionAttention(2, 2)(draw(1, 15, 8), draw(1, 3, 5, 8))
