import numpy as np
import pytest
import tensorflow as tf

from training import load_data
from training.canvas import NOISE_SHIFT
from training.data import subset
from training.digits import read_digits


def first(data, count=40):
    pairs = list(data.stream("train").take(count).as_numpy_iterator())
    maps = list(data.label_maps().take(count).as_numpy_iterator())
    images = np.stack([tf.io.decode_png(x).numpy()[..., 0] for x, _ in pairs])
    labels = np.array([y for _, y in pairs])
    return (
        images,
        labels,
        np.stack([x for x, _ in maps]),
        np.stack([y for _, y in maps]),
    )


def test_every_digit_is_on_one_canvas_with_its_square_as_label_map():
    data = load_data("placed_digits:40")
    assert data.sizes == {"train": 1437, "validation": 360}
    assert data.image_size == (40, 40) and len(data.labels) == 10
    images, labels, values, classes = first(data)
    assert images.shape == (40, 40, 40) and values.shape == classes.shape
    assert values.dtype == np.float16 and classes.dtype == np.int32
    np.testing.assert_array_equal(labels, read_digits()["train"][1][:40])
    assert (classes[..., 0] == labels[:, None, None]).all()
    inside = values[..., 0] > 0
    assert set(np.unique(values)) == {0, 1}
    sides = np.sqrt(inside.sum((1, 2)))
    assert sides.min() >= 15 and sides.max() <= 25 and len(set(sides)) > 5
    noise = 255 >> NOISE_SHIFT
    assert images[~inside].max() <= noise
    assert all(
        (image[square] > noise).mean() > 0.1
        for image, square in zip(images, inside, strict=True)
    )
    rows = inside.any(2).argmax(1)
    assert rows.min() < 6 and rows.max() > 14  # anywhere


def test_the_same_name_is_the_same_data_and_another_size_another():
    one, two, other = (load_data(f"placed_digits{x}") for x in ("", ":24", ":48"))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    for x, y in zip(first(one), first(two), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_subset_keeps_each_map_with_its_image():
    data = subset(load_data("placed_digits"), 25, seed=3)
    images, labels, values, classes = first(data)
    assert len(images) == len(values) == 25
    assert (classes[..., 0] == labels[:, None, None]).all()
    for image, square in zip(images, values[..., 0] > 0, strict=True):
        assert image[~square].max() <= 255 >> NOISE_SHIFT < image[square].max()


def test_a_wrong_size_is_refused():
    with pytest.raises(ValueError, match=r"must be in 16\.\.256 pixels, got 15"):
        load_data("placed_digits:15")
    with pytest.raises(ValueError, match=r"'folder:PATH' or 'arrays:FILE\.npz', got"):
        load_data("placed_digits:large")
