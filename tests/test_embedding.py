import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import PatchEmbedding, PixelNormalization, PrefixTokens


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (PixelNormalization("imagenet"), (2, 5, 7, 3), (2, 5, 7, 3)),
        (PixelNormalization([[0.1, 0.2, 0.3], (1, 2, 3)]), (2, 5, 7, 3), (2, 5, 7, 3)),
        (PatchEmbedding(6, patch_size=4), (2, 8, 12, 3), (2, 2, 3, 6)),
        (PrefixTokens(), (2, 2, 3, 5), (2, 7, 5)),
        (PrefixTokens(True, True, 4), (2, 2, 3, 5), (2, 12, 5)),
        (PrefixTokens(False), (2, 2, 3, 5), (2, 6, 5)),
    ],
)
def test_layer(check_layer, layer, shape, expected):
    assert check_layer(layer, draw(*shape)).shape == expected


def test_patch_embedding_is_a_linear_map_of_flattened_patches():
    x = draw(1, 6, 10, 3)
    layer = PatchEmbedding(5, patch_size=2, initialization="timm")
    grid = to_numpy(layer(x))
    kernel, bias = layer.get_weights()
    expected = reference.patches(x[0], 2) @ kernel.reshape(-1, 5) + bias
    np.testing.assert_allclose(grid[0].reshape(-1, 5), expected, atol=1e-5)


def test_a_dynamic_image_is_padded_right_and_bottom_to_whole_patches():
    inputs = keras.Input((None, None, 3))
    layer = PatchEmbedding(5, patch_size=4)
    model = keras.Model(inputs, layer(inputs))
    assert model.output_shape == (None, None, None, 5)
    x = draw(2, 6, 9, 3)
    padded = np.pad(x, ((0, 0), (0, 2), (0, 3), (0, 0)))
    np.testing.assert_allclose(to_numpy(model(x)), to_numpy(model(padded)), atol=1e-6)
    assert model(x).shape == (2, 2, 3, 5)


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (
            "clip",  # openai/CLIP, clip/clip.py
            (0.48145466, 0.4578275, 0.40821073),
            (0.26862954, 0.26130258, 0.27577711),
        ),
        (((0.1, 0.2, 0.3), [0.4, 1, 0.6]), (0.1, 0.2, 0.3), (0.4, 1, 0.6)),
        (None, (0, 0, 0), (1 / 255,) * 3),
    ],
)
def test_pixels_are_normalised_by_channel(name, mean, std):
    x = np.random.default_rng(0).uniform(0, 255, size=(2, 3, 5, 3)).astype("float32")
    y = to_numpy(PixelNormalization(name)(x))
    np.testing.assert_allclose(y, (x / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_prefix_tokens_come_first_in_the_order_class_distillation_registers():
    layer = PrefixTokens(True, True, 2)
    grid = draw(1, 2, 3, 4)
    layer(grid)
    layer.set_weights(
        [np.full((1, n, 4), v) for n, v in ((1, 1.0), (1, 2.0), (2, 3.0))]
    )
    tokens = to_numpy(layer(grid))[0]
    assert tokens[:4, 0].tolist() == [1, 2, 3, 3]
    np.testing.assert_array_equal(tokens[4:], grid.reshape(6, 4))


def test_an_empty_batch_gives_an_empty_batch():
    assert PrefixTokens()(PatchEmbedding(6, 4)(np.zeros((0, 8, 8, 3)))).shape == (
        0,
        5,
        6,
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"patch_size=5 must divide .* got 8 x 10"):
        PatchEmbedding(6, patch_size=5)(np.zeros((1, 8, 10, 3)))
    with pytest.raises(ValueError, match="normalization must be 'inception'"):
        PixelNormalization("imagnet")
    for pair in ([], [(0, 0, 0)], [(0, 0), (1, 1)], (0.5, 0.5), 7):
        with pytest.raises(ValueError, match=r"'clip', a pair .* three numbers each"):
            PixelNormalization(pair)
    for number in (float("nan"), float("inf"), "0.5", None):
        with pytest.raises(ValueError, match="must be finite numbers, got"):
            PixelNormalization([(0, 0, number), (1, 1, 1)])
    for number in (0, -0.1):
        with pytest.raises(ValueError, match=r"deviation .* must be positive, got"):
            PixelNormalization([(0, 0, 0), (1, number, 1)])
    with pytest.raises(ValueError, match="3 channels, got 1"):
        PixelNormalization()(np.zeros((1, 8, 8, 1)))
    with pytest.raises(ValueError, match="crop_ratio must be in"):
        PixelNormalization(crop_ratio=1.5)
    with pytest.raises(ValueError, match="interpolation must be"):
        PixelNormalization(interpolation="nearest")
