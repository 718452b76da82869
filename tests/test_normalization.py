import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import ViT, kernels
from keras_vit.normalization import LayerNormalization


def draw(*shape, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(3.0, 2.0, shape).astype("float32")


def layer_with(dim, epsilon=1e-6):
    layer = LayerNormalization(epsilon)
    layer.build((None, None, dim))
    layer.gamma.assign(draw(dim, seed=1))
    layer.beta.assign(draw(dim, seed=2))
    return layer


@pytest.mark.parametrize("shape", [(6, 7), (3, 5, 7), (1, 1, 9), (2, 3, 4, 5)])
def test_each_token_is_normalised_by_its_own_mean_and_variance(shape):
    layer, x = layer_with(shape[-1], 1e-3), draw(*shape)
    expected = reference.layer_norm(
        x, to_numpy(layer.gamma), to_numpy(layer.beta), 1e-3
    )
    np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=2e-5)


def test_it_is_a_layer_as_keras_has_it(check_layer):
    check_layer(LayerNormalization(1e-5), draw(2, 5, 8))
    config = LayerNormalization(1e-5).get_config()
    assert keras.layers.LayerNormalization(**config).epsilon == 1e-5


def test_statistics_are_float32_where_tokens_are_not():
    """bfloat16 has 8 bits: sums of 384 numbers around 3 would be off by percents."""
    layer = LayerNormalization(dtype="mixed_bfloat16")
    x = keras.ops.cast(draw(2, 5, 384), "bfloat16")
    found = layer(x)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    exact = to_numpy(keras.ops.cast(x, "float32"))
    expected = reference.layer_norm(exact, 1.0, 0.0)
    found = to_numpy(keras.ops.cast(found, "float32"))
    assert np.abs(found - expected).max() <= 2**-8 * np.abs(expected).max()


def test_the_gradient_is_that_of_the_equation():
    x, upstream, step = draw(3, 7), draw(3, 7, seed=3), 1e-3
    gamma, beta = draw(7, seed=1), draw(7, seed=2)

    def loss(x):
        return (reference.layer_norm(x, gamma, beta) * upstream).sum()

    expected = np.zeros_like(x, "float64")
    for place in np.ndindex(x.shape):
        nudge = np.zeros_like(x, "float64")
        nudge[place] = step
        expected[place] = (loss(x + nudge) - loss(x - nudge)) / (2 * step)
    np.testing.assert_allclose(gradient(x, gamma, beta, upstream), expected, atol=2e-3)


def gradient(x, gamma, beta, upstream):
    """Of the sum of what comes out, weighted by `upstream`, by `x`."""

    def loss(x):
        y = kernels.layer_norm(x, gamma, beta, 1e-6)
        return keras.ops.sum(y * upstream)

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x)
        return tape.gradient(value, x).numpy()
    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.grad(loss)(x))
    import torch

    x, gamma, beta, upstream = (
        torch.tensor(a, device="cpu") for a in (x, gamma, beta, upstream)
    )
    x.requires_grad_()
    loss(x).backward()
    return x.grad.numpy()


def test_a_model_without_images_has_no_answers():
    model = ViT("tiny", image_size=16, depth=1, embed_dim=24, num_heads=3)
    assert to_numpy(model(np.zeros((0, 16, 16, 3), "float32"))).shape == (0, 1000)
