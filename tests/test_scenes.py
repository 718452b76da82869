import numpy as np
import pytest
import tensorflow as tf
from test_data import few_scenes

from training import load_data, scenes
from training.digits import read_digits
from training.preprocess import decode, decode_mask
from training.scenes import SIDES, THRESHOLD, draw_scene


def decoded(data, part):
    """Grey images and masks of a part."""
    pairs = [(decode(x)[..., 0], decode_mask(y)[..., 0]) for x, y in data.stream(part)]
    return [np.stack(x) for x in zip(*pairs, strict=True)]


def test_scenes_are_the_same_each_time():
    data = load_data("digit_scenes")
    assert data.sizes == {"train": 2000, "validation": 300} and data.masks
    assert data.labels == ("background", *"0123456789")
    assert data.image_size == (64, 64)
    assert data.fingerprint == few_scenes().fingerprint
    assert data.fingerprint != few_scenes(size=48).fingerprint


def test_the_pixels_of_a_digit_are_the_bright_ones():
    for part in ("train", "validation"):
        images, masks = decoded(few_scenes(), part)
        np.testing.assert_array_equal(images >= THRESHOLD, masks > 0)
        assert set(np.unique(masks)) == set(range(11))
        background = images[masks == 0]
        assert 0 < np.median(background) < 31


@pytest.mark.parametrize("size", [32, 64, 96])
def test_digits_are_whole_squares_that_do_not_overlap(size):
    """Digits without a dark pixel, no two of one class."""
    digits, labels = np.full((250, 8, 8), 255, "uint8"), np.arange(250)
    counts = []
    for seed in range(50):
        random = np.random.default_rng(seed)
        _, mask = draw_scene(size, digits, labels, random)
        found = [value for value in np.unique(mask) if value]
        counts.append(len(found))
        for value in found:
            rows, columns = np.nonzero(mask == value)
            side = np.ptp(rows) + 1
            assert SIDES[0] <= side <= SIDES[1] and np.ptp(columns) + 1 == side
            assert len(rows) == side**2
    area = (size / 64) ** 2
    assert 2.8 * area < np.mean(counts) < 3.6 * area + 0.3


def test_a_larger_canvas_has_the_same_density():
    shares = [
        (decoded(few_scenes(4, 100, size), "validation")[1] > 0).mean()
        for size in (64, 96)
    ]
    assert 0.1 < shares[0] < 0.16 and abs(shares[1] / shares[0] - 1) < 0.15


def test_each_part_shows_digits_of_its_own_split(monkeypatch):
    """With small digits in one split and large ones in the other."""
    splits = read_digits()
    keep = {"train": splits["train"][1] < 5, "test": splits["test"][1] >= 5}
    only = {name: [x[keep[name]] for x in splits[name]] for name in splits}
    monkeypatch.setattr(scenes, "read_digits", lambda: only)
    monkeypatch.setattr(scenes, "COUNTS", {"train": 20, "validation": 20})
    data = load_data("digit_scenes")
    assert set(np.unique(decoded(data, "train")[1])) == {0, 1, 2, 3, 4, 5}
    assert set(np.unique(decoded(data, "validation")[1])) == {0, 6, 7, 8, 9, 10}


@pytest.mark.parametrize("side", SIDES)
def test_digits_are_enlarged_bilinearly(side):
    digit = read_digits()["train"][0][0]
    expected = tf.image.resize(digit[..., None], (side, side))[..., 0]
    assert np.abs(scenes.enlarge(digit, side) - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size", [0, 31, 257])
def test_a_canvas_out_of_range_is_refused(size):
    with pytest.raises(ValueError, match=rf"must be in 32\.\.256 pixels, got {size}\."):
        load_data(f"digit_scenes:{size}")
