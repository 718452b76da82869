import functools
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from export.images import strict, tolerant
from export.requests import encoded, huge_png, mixed_files
from keras_vit.embedding import Preprocess
from training.preprocess import decode, inspect, orientation, resize


def photo(height, width):
    """A smooth picture of which no two sides or corners are alike."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [200 * x + 20, 220 * y + 10, 100 + 90 * np.sin(9 * x + 4 * y)]
    return np.stack(planes, -1).astype("uint8")


def lying(number, pixels, order="<", kind="JPEG"):
    """A file with an EXIF orientation, after some other tags."""
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0110], exif[0x0112] = "maker", "camera", number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif, quality=98, subsampling=0)
    return file.getvalue()


@functools.cache
def graph(preprocess, max_pixels=2**26):
    """`tolerant` as it is exported: traced once."""

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def answer(files):
        return tolerant(files, preprocess, max_pixels)

    return lambda files: [x.numpy() for x in answer(tf.constant(files, tf.string))]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("number", range(1, 9))
def test_a_photograph_is_turned_as_pillow_turns_it(number, order):
    data = lying(number, photo(48, 80), order)
    assert orientation(data) == number
    stored = Image.fromarray(tf.io.decode_jpeg(data).numpy())
    stored.getexif()[0x0112] = number
    expected = np.asarray(ImageOps.exif_transpose(stored))
    np.testing.assert_array_equal(decode(data), expected)


def test_no_orientation_is_upright():
    plain = encoded(photo(20, 30), "JPEG")
    exif = lying(6, photo(20, 30))
    damaged = exif.replace(b"Exif\0\0II*\0", b"Exif\0\0II*\xff")  # IFD is nowhere
    for data in (plain, b"", b"\xff\xd8", exif[:40], lying(9, photo(4, 4)), damaged):
        assert orientation(data) in (1, 6 if data is damaged else 1)
    assert orientation(exif[:12] + bytes(200)) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_header_tells_the_size(kind):
    data, size, number = inspect(encoded(photo(31, 45), kind))
    assert size.numpy().tolist() == [31, 45] and number == 1
    whole = tf.io.decode_image(data, expand_animations=False)
    assert whole.shape[:2] == (31, 45)
    for end in (0, 1, 8, 15):
        assert inspect(encoded(photo(31, 45), kind)[:end])[1].numpy().min() == 0


@pytest.mark.parametrize(
    "other", [b"RIFF1234WEBPVP8 ", b"II*\0", b"%PDF-1.4", b"\0" * 99]
)
def test_what_is_no_image_has_no_size(other):
    assert inspect(other)[1].numpy().tolist() == [0, 0]


def test_of_a_gif_only_the_first_frame_is_read():
    frames = [Image.fromarray(np.full((300, 400), 9 * i, "uint8")) for i in range(20)]
    file = io.BytesIO()
    frames[3].save(file, "GIF", save_all=True, append_images=frames, comment=b"x" * 700)
    data, size, _ = inspect(file.getvalue())
    assert len(data.numpy()) < len(file.getvalue()) / 10
    assert size.numpy().tolist() == [300, 400]
    first_frame = tf.io.decode_image(data, channels=3, expand_animations=False)
    assert np.unique(first_frame) == [27]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [None, 0.875, 1.0])
def test_what_is_served_is_what_is_trained_on(interpolation, crop_ratio):
    """Turned after it was made small, and before."""
    preprocess = Preprocess((24, 36), crop_ratio, interpolation)
    shapes = [(48, 80), (81, 47), (24, 36), (10, 200)]
    files = [lying(i, photo(*shape)) for i in range(1, 9) for shape in shapes]
    files += [encoded(photo(51, 33), kind) for kind in ("PNG", "GIF", "BMP")]
    images, valid = graph(preprocess)(files)
    assert valid.all()
    for file, image in zip(files, images, strict=True):
        expected = resize(decode(file), preprocess).numpy()
        np.testing.assert_allclose(image, expected, atol=0.01)


def test_a_bad_file_costs_its_row_or_the_request():
    preprocess = Preprocess((24, 24), None, "bilinear")
    files, whole = mixed_files()
    images, valid = graph(preprocess)(files.tolist())
    assert valid.tolist() == whole
    assert not images[~valid].any() and images[valid].any((1, 2, 3)).all()
    alone, _ = graph(preprocess)(files.tolist()[:1])
    np.testing.assert_array_equal(images[[0, -1]], alone[[0, 0]])
    good = tf.constant(files[[0, -1]].tolist())
    np.testing.assert_allclose(strict(good, preprocess, 2**26)[0], images[[0, -1]])
    for bad in np.flatnonzero(~valid):
        with pytest.raises(tf.errors.InvalidArgumentError):
            strict(tf.constant(files[[0, bad]].tolist()), preprocess, 2**26)
    images, valid = graph(preprocess)([])
    assert images.shape == (0, 24, 24, 3) and valid.shape == (0,)


def test_a_huge_image_is_told_from_its_header():
    preprocess = Preprocess((24, 24), None, "bilinear")
    small = graph(preprocess, 99)
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        files = [encoded(photo(*shape), kind) for shape in ((9, 11), (10, 10))]
        assert small(files)[1].tolist() == [True, False]
    assert graph(preprocess)([huge_png(), huge_png(64)])[1].tolist() == [False, True]
    with pytest.raises(tf.errors.InvalidArgumentError, match="these are not"):
        strict(tf.constant([huge_png(64), huge_png()]), preprocess, 2**26)


def test_a_narrow_strip_takes_no_memory():
    """Covering the model's image with it would take 12 GB."""
    strip = encoded(np.zeros((1, 16_000, 3), "uint8"), "PNG")
    preprocess = Preprocess((24, 24), 0.875, "bicubic")
    images, valid = graph(preprocess)([strip])
    assert valid.all() and not images.any()
    assert resize(decode(strip), preprocess).shape == (24, 24, 3)
