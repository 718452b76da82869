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


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a server runs TensorFlow"
)
def test_that_of_a_server_is_the_same():
    layer, x = layer_with(7, 1e-3), 100 + draw(3, 5, 7)
    expected = to_numpy(layer(x))
    with kernels.serving():
        assert kernels.is_serving()
        np.testing.assert_allclose(to_numpy(layer(x)), expected, atol=2e-4)
        np.testing.assert_allclose(to_numpy(layer(x[0])), expected[0], atol=2e-4)
    assert not kernels.is_serving()


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a server runs TensorFlow"
)
@pytest.mark.parametrize("change", [{"center": False}, {"scale": False}, {"axis": 1}])
def test_what_no_server_fuses_is_as_keras_has_it(change):
    x = draw(2, 5, 8)
    layer = LayerNormalization(**change)
    expected = to_numpy(layer(x))
    with kernels.serving():
        np.testing.assert_array_equal(to_numpy(layer(x)), expected)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="XLA compiles TensorFlow here"
)
def test_xla_keeps_the_digits_of_tokens_far_from_zero():
    import tensorflow as tf

    layer, x = layer_with(384), 1000 + draw(1, 5, 384)
    compiled = tf.function(layer, jit_compile=True)
    np.testing.assert_allclose(to_numpy(compiled(x)), to_numpy(layer(x)), atol=5e-3)


def test_a_model_without_images_has_no_answers():
    model = ViT("tiny", image_size=16, depth=1, embed_dim=24, num_heads=3)
    assert to_numpy(model(np.zeros((0, 16, 16, 3), "float32"))).shape == (0, 1000)
