import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_preprocess import encode, photo

from keras_vit.embedding import Preprocess
from training.augment import random_resized_crop
from training.box import decode_box
from training.preprocess import decode

SHAPE = (67, 101)


def jpeg(orientation=1, **options):
    """A noisy JPEG, whose colours differ from pixel to pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype("uint8")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"quality": 90, **options}
    Image.fromarray(pixels).save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def boxes(shape, count=60):
    """Boxes of any offset and size, the whole and single pixels among them."""
    random = np.random.default_rng(1)
    for i in range(count):
        offset = [random.integers(0, side) for side in shape]
        size = [
            random.integers(1, s - o + 1) for s, o in zip(shape, offset, strict=True)
        ]
        yield ([0, 0], list(shape)) if i == 0 else (offset, [1, 1] if i == 1 else size)


def check_boxes(data, count=60):
    expected = decode(data).numpy()
    shape = expected.shape[:2]
    read = tf.function(lambda o, s: decode_box(data, lambda whole: (o, s)))
    for (top, left), (height, width) in boxes(shape, count):
        offset, size = tf.constant([top, left]), tf.constant([height, width])
        found, *rest = read(offset, size)
        part = expected[top : top + height, left : left + width]
        np.testing.assert_array_equal(found, part)
        for a, b in zip(rest, (offset, size, shape), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.first
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_has_the_pixels_of_the_whole_in_every_orientation(orientation):
    check_boxes(jpeg(orientation))


@pytest.mark.first
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_a_box_has_the_pixels_of_the_whole_however_colours_are_stored(
    subsampling, progressive
):
    check_boxes(jpeg(subsampling=subsampling, progressive=progressive))


@pytest.mark.first
@pytest.mark.parametrize("kind, mode", [("PNG", "RGB"), ("GIF", "P"), ("BMP", "RGB")])
def test_a_box_of_another_file_is_cut_out(kind, mode):
    check_boxes(encode(photo(*SHAPE, mode), kind), 20)


@pytest.mark.first
def test_a_grey_jpeg_and_one_with_more_behind_it_are_cut_out_too():
    check_boxes(encode(photo(*SHAPE, "L"), "JPEG"), 20)
    check_boxes(jpeg(6) + b"more", 20)


@pytest.mark.first
def test_what_is_cut_off_is_an_error_wherever_the_box_lies():
    data = jpeg()
    for damaged in (data[:-200], data[: len(data) // 2], data[:300], b"", b"text"):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_box(
                damaged, lambda whole: (tf.constant([0, 0]), tf.constant([1, 1]))
            )


@pytest.mark.first
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_of_a_file_is_that_of_its_image(orientation):
    data, preprocess = jpeg(orientation), Preprocess((24, 32), None, "bicubic")
    image = decode(data)
    for i in range(20):
        seed = tf.constant([i, 5], tf.int64)
        for found, expected in zip(
            random_resized_crop(tf.constant(data), preprocess, seed),
            random_resized_crop(image, preprocess, seed),
            strict=True,
        ):
            np.testing.assert_array_equal(found, expected)
