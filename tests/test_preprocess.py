import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit import ViT
from keras_vit.embedding import Preprocess
from training.preprocess import decode, decode_mask, geometry, resize, resize_mask


def photo(height, width, mode="RGB"):
    """A smooth picture with some texture, as Pillow image."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (9 + i)) * np.cos(y / (7 + i)) * 90 + 128 for i in range(4)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, 4))
    pixels = np.clip(np.stack(waves, -1) + noise, 0, 255).astype("uint8")
    return Image.fromarray(pixels, "RGBA").convert(mode)


def encode(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_the_record_travels_with_the_model(tmp_path):
    model = ViT("deit_tiny", image_size=(32, 48), depth=1, num_classes=3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    expected = Preprocess((32, 48), 0.875, "bicubic")
    assert Preprocess.of_model(model) == Preprocess.of_model(loaded) == expected
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="must contain a PixelNormalization"):
        Preprocess.of_model(plain)


@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("PNG", "L"), ("BMP", "RGB")])
def test_lossless_files_decode_to_rgb(kind, mode):
    image = photo(31, 45, mode)
    pixels = decode(encode(image, kind)).numpy()
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_jpeg_gif_and_rgba_decode_to_three_channels():
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("GIF", "P"), ("PNG", "RGBA")):
        assert decode(encode(photo(20, 30, mode), kind)).shape == (20, 30, 3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [None, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224), (40, 61)])
def test_pixels_are_those_of_pillow_within_one_grey_level(
    interpolation, crop_ratio, shape
):
    image = photo(*shape)
    height, width = 96, 64
    preprocess = Preprocess((height, width), crop_ratio, interpolation)
    pixels = resize(decode(encode(image, "PNG")), preprocess).numpy()
    assert pixels.shape == (height, width, 3)

    method = getattr(Image.Resampling, interpolation.upper())
    if crop_ratio is None:
        expected = image.resize((width, height), method)
    else:  # torchvision's Resize (the smaller side decides) and CenterCrop
        floor = int(height / crop_ratio), int(width / crop_ratio)
        scale = max(floor[0] / shape[0], floor[1] / shape[1])
        size = [
            max(low, int(side * scale)) for low, side in zip(floor, shape, strict=True)
        ]
        resized = image.resize((size[1], size[0]), method)
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        expected = resized.crop((left, top, left + width, top + height))
    expected = np.asarray(expected, "float32")  # rounded, after each of the two axes
    assert np.abs(np.round(pixels) - expected).max() <= 1
    assert np.abs(pixels - expected).mean() < 0.4


@pytest.mark.parametrize("crop_ratio", [None, 0.6, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(80, 120), (130, 70), (48, 48), (31, 53)])
def test_a_mask_stays_where_its_image_is(crop_ratio, shape):
    """Blobs of four classes, each with its own brightness, in image and mask."""
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    mask = ((y // 11) * 2 + x // 9) % 4
    image = np.repeat((mask * 80)[..., None], 3, -1).astype("uint8")
    preprocess = Preprocess((48, 64), crop_ratio, "bilinear")
    pixels = resize(tf.constant(image), preprocess).numpy()[..., 0]
    labels = resize_mask(tf.constant(mask[..., None], tf.uint8), preprocess)
    assert labels.shape == (48, 64) and labels.dtype == tf.uint8
    labels = labels.numpy()
    assert set(np.unique(labels)) <= {0, 1, 2, 3}
    inner = np.ones_like(labels, bool)  # all four neighbours are of the same class
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(labels, step, axis) == labels
    assert inner.mean() > 0.25
    assert (np.abs(pixels / 80 - labels) > 0.5)[inner].mean() < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [None, 0.6, 0.875, 1.0])
@pytest.mark.parametrize("shape", [(80, 120), (130, 70), (31, 53)])
def test_geometry_tells_where_each_pixel_came_from(interpolation, crop_ratio, shape):
    """Three channels say where a pixel of the file is: x, y and 1, in 255ths."""

    def points(height, width):
        y, x = np.mgrid[0.5:height, 0.5:width]
        return np.stack([x / width, y / height, np.ones_like(x)], -1)

    preprocess = Preprocess((48, 64), crop_ratio, interpolation)
    pixels = resize(tf.constant(points(*shape) * 255, tf.float32), preprocess) / 255
    matrix = geometry(shape, preprocess).numpy()
    np.testing.assert_array_equal(matrix, geometry(tf.constant(shape), preprocess))
    inner = np.s_[4:-4, 4:-4]
    expected = (points(48, 64) @ matrix.T)[inner]
    np.testing.assert_allclose(pixels.numpy()[inner], expected, atol=2e-3)
    if crop_ratio is None:
        np.testing.assert_array_equal(matrix, np.eye(3))


def test_masks_are_png_files_of_one_channel():
    classes = np.arange(35, dtype="uint8").reshape(5, 7)
    classes[0, 0] = 255
    mask = decode_mask(encode(Image.fromarray(classes), "PNG"))
    np.testing.assert_array_equal(mask[..., 0], classes)
    for mode in ("RGB", "RGBA", "P"):  # a palette is colours too
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_mask(encode(photo(8, 8, mode), "PNG"))


def test_what_is_no_image_is_an_error():
    whole = encode(photo(64, 64), "PNG")
    for data in (b"", b"text", whole[:500]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(data)
