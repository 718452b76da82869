import keras
import numpy as np
import pytest
from conftest import to_numpy

from keras_vit import ConvStem


def test_layer(check_layer):
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype("float32")
    assert check_layer(ConvStem(12, 8, width=4), x).shape == (2, 3, 2, 12)


def test_the_first_convolution_is_padded_by_three_on_every_side():
    """A kernel that is 1 in its centre takes pixel 0, 2, 4, ...; "same" pads 2 and 3
    and would take 1, 3, 5."""
    stem = ConvStem(6, 8, width=4)
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype("float32")
    stem(x)
    kernel = np.zeros((7, 7, 3, 4), "float32")
    kernel[3, 3, 0] = 1
    stem.convolutions[0].kernel.assign(kernel)
    found = []
    norm = stem.norms[0].call
    stem.norms[0].call = lambda y, **kwargs: found.append(y) or norm(y, **kwargs)
    stem(x)
    np.testing.assert_allclose(to_numpy(found[0])[..., 0], x[:, ::2, ::2, 0], atol=1e-6)


def test_batch_statistics_are_those_of_pytorch():
    """New mean = 0.9 old + 0.1 batch: momentum 0.1 in PyTorch's words."""
    stem = ConvStem(6, 8, width=4)
    x = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype("float32")
    stem(x, training=True)
    y = stem.convolutions[0](np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0))))
    mean = to_numpy(y).mean((0, 1, 2))
    np.testing.assert_allclose(
        to_numpy(stem.norms[0].moving_mean), 0.1 * mean, atol=1e-5
    )
    assert stem.norms[0].epsilon == 1e-5


def test_a_dynamic_image_is_padded_right_and_bottom_to_whole_patches():
    x = np.random.default_rng(0).normal(size=(2, 24, 16, 3)).astype("float32")
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, ConvStem(6, 8, width=4)(inputs))
    cut = x[:, :19, :13]
    padded = np.pad(cut, ((0, 0), (0, 5), (0, 3), (0, 0)))
    np.testing.assert_allclose(
        model.predict_on_batch(cut), model.predict_on_batch(padded), atol=1e-5
    )


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match=r"patch_size must be even .* got 7"):
        ConvStem(6, 7)
    with pytest.raises(ValueError, match=r"patch_size=8 must divide .* got 12 x 16"):
        ConvStem(6, 8)(np.zeros((1, 12, 16, 3), "float32"))
