import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from scipy.ndimage import gaussian_filter
from test_augment import several

from training import colors, erasing
from training.augment import (
    LARGEST,
    RAND_AUGMENT_OPS,
    rand_augment_draws,
    rand_augment_geometry,
)

SEED = tf.constant([3, 4], tf.int64)


def pictures():
    """Photographs in small: noise, dark, smooth, of few values, flat, and large."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:24, 0:40]
    smooth = 120 + 60 * np.sin(x / 7) * np.cos(y / 5)
    smooth = np.stack([smooth, smooth / 2 + x, 255 - smooth], -1)
    yield from random.integers(0, 256, (2, 24, 40, 3))
    yield random.integers(30, 90, (24, 40, 3))
    yield smooth
    yield random.choice([10, 11, 200], (24, 40, 3))
    yield np.full((24, 40, 3), [7, 90, 255])
    yield random.integers(0, 256, (120, 150, 3)) // [1, 2, 4] + [0, 20, 60]


PICTURES = [np.asarray(x, "uint8") for x in pictures()]


def timms(name, level):
    """The operation of `rand-inc1` as timm does it with Pillow, at a level of -10..10.

    Where the amount is a factor, a negative level is timm's other sign.
    """
    share = abs(level) / 10
    factor = max(0.1, 1 + 0.9 * level / 10)
    add = [min(255, i + int(share * 110)) if i < 128 else i for i in range(256)]
    return {
        "auto_contrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "invert": ImageOps.invert,
        "posterize": lambda x: ImageOps.posterize(x, 4 - int(share * 4)),
        "solarize": lambda x: ImageOps.solarize(x, 256 - int(share * 256)),
        "solarize_add": lambda x: x.point(add * 3),
        "color": lambda x: ImageEnhance.Color(x).enhance(factor),
        "contrast": lambda x: ImageEnhance.Contrast(x).enhance(factor),
        "brightness": lambda x: ImageEnhance.Brightness(x).enhance(factor),
        "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(factor),
    }[name]


# Pillow cuts off what is behind the point; in sharpness also of the smoothed image.
ROUNDING = {"auto_contrast": 1, "color": 1.5, "contrast": 1.5, "brightness": 1}
ROUNDING |= {"sharpness": 1.5}


@pytest.mark.parametrize("name", colors.OPERATIONS)
def test_rand_augment_changes_colours_as_pillow_does(name):
    operation, changed = colors.OPERATIONS[name], 0
    for level in (-10, -9.3, -5, -0.4, 0, 0.4, 2.5, 5, 7.7, 9.3, 10):
        for picture in PICTURES:
            expected = np.asarray(timms(name, level)(Image.fromarray(picture)), float)
            found = operation(tf.constant(picture, tf.float32), level / 10).numpy()
            assert found.shape == picture.shape and found.dtype == "float32"
            assert found.min() >= 0 and found.max() <= 255
            far = np.abs(found - expected).max()
            assert far <= ROUNDING.get(name, 0) + 1e-3, (level, far)
            changed = max(changed, np.abs(found - picture).mean())
    assert changed > 5


def timm_auto_augment():
    """timm's module of operations, which needs Pillow alone, without all of timm."""
    found = importlib.util.find_spec("timm")
    if found is None:
        pytest.skip("timm, with which it is compared, comes with the extra `peers`")
    path = Path(found.submodule_search_locations[0], "data", "auto_augment.py")
    spec = importlib.util.spec_from_file_location("auto_augment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_operations_and_levels_are_those_of_timm():
    timm = timm_auto_augment()
    names = {
        x.replace("_", "").lower(): x for x in (*LARGEST, *colors.OPERATIONS)
    }  # as timm writes them
    image, seen = Image.fromarray(PICTURES[0]), []
    for name in timm._RAND_INCREASING_TRANSFORMS:
        plain = name.removesuffix("Increasing").removesuffix("Rel").lower()
        own = names[plain]
        seen.append(own)
        for level in (7, 0.3) if own in colors.OPERATIONS else ():
            operation = timm.AugmentOp(name, prob=1, magnitude=level, hparams={})
            found = np.asarray(operation(image)).astype(int)
            sides = [np.asarray(timms(own, x)(image)) for x in (-level, level)]
            assert min(np.abs(found - side).max() for side in sides) == 0, name
    assert sorted(seen) == sorted(names.values())
    assert len(seen) == RAND_AUGMENT_OPS


def test_a_blur_is_a_gaussian():
    for radius in (0.1, 0.5, 1.3, 2.0):
        for picture in PICTURES:
            image = picture.astype("float32")
            expected = gaussian_filter(
                image, (radius, radius, 0), mode="nearest", radius=(8, 8, 0)
            )
            found = colors.gaussian_blur(tf.constant(image), radius)
            np.testing.assert_allclose(found, expected, atol=2e-3)


def test_grey_is_the_brightness_that_pillow_has():
    for picture in PICTURES:
        expected = np.asarray(Image.fromarray(picture).convert("L"), float)
        found = colors.grey(tf.constant(picture, tf.float32)).numpy()
        assert np.abs(found - expected[..., None]).max() <= 0.51


def flat(level=100.0, size=(6, 9)):
    return tf.fill((*size, 3), level)


def test_an_operation_of_rand_augment_is_done_once_by_colour_or_by_geometry():
    """Of each slot one of both acts, and which one is that of the common draw."""
    random = np.random.default_rng(0).integers(0, 256, (6, 9, 3))
    image = tf.constant(random, tf.float32)
    amounts = {"num_ops": 1, "magnitude": 8.0, "deviation": 0.0}

    def draw(seed):
        ops, shares = rand_augment_draws(seed, 1, **amounts)
        moved = rand_augment_geometry(seed, 1, (6, 9), **amounts)[0]
        return (
            ops[0, 0],
            shares[0, 0],
            colors.rand_augment(image, seed, **amounts),
            moved,
        )

    seen = set()
    for op, share, coloured, matrix in zip(*several(draw, 400), strict=True):
        seen.add(op)
        moves = np.abs(matrix - np.eye(3)).max() > 0
        assert moves == (0 <= op <= 4)
        expected = image
        if op >= 5:
            expected = list(colors.OPERATIONS.values())[op - 5](image, share)
        np.testing.assert_allclose(coloured, expected, atol=1e-3)
    assert seen == set(range(-1, 15))


def test_colours_come_in_the_order_drawn():
    image = tf.constant(PICTURES[3], tf.float32)
    amounts = {"num_ops": 3, "magnitude": 9.0, "deviation": 0.5}
    different = 0
    for i in range(25):
        seed = tf.constant([i, 5], tf.int64)
        ops, shares = rand_augment_draws(seed, 1, **amounts)
        expected, reverse = image, image
        steps = list(zip(ops[:, 0].numpy(), shares[:, 0].numpy(), strict=True))
        steps = [(op, share) for op, share in steps if op >= 5]
        for op, share in steps:
            expected = list(colors.OPERATIONS.values())[op - 5](expected, share)
        for op, share in steps[::-1]:
            reverse = list(colors.OPERATIONS.values())[op - 5](reverse, share)
        found = colors.rand_augment(image, seed, **amounts)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        different += np.abs(np.subtract(expected, reverse)).max() > 5
    assert different > 3


def test_3_augment_does_one_of_three_each_as_often():
    image = tf.constant(PICTURES[3], tf.float32)
    found = several(lambda seed: colors.three_augment(image, seed), 600)
    grey = np.ptp(found, axis=-1).max((1, 2)) < 1e-3
    solarized = np.abs(found - colors.solarize(image, 128)).max((1, 2, 3)) < 1e-3
    for kind in (grey, solarized, ~(grey | solarized)):
        assert abs(kind.mean() - 1 / 3) < 0.06
    assert not (grey & solarized).any()
    np.testing.assert_allclose(found[grey][0], colors.grey(image), atol=1e-3)
    blurred = found[~(grey | solarized)]
    spread = blurred.std((1, 2, 3))
    least = colors.gaussian_blur(image, 2.0).numpy().std()
    assert spread.min() > least - 1e-3 and np.ptp(spread) > 0.5 * (
        image.numpy().std() - least
    )


def test_jitter_multiplies_by_up_to_its_amount():
    """Of a grey image only brightness changes; contrast keeps its mean."""
    found = several(lambda seed: colors.color_jitter(flat(), seed, 0.3), 900)
    factor = found[:, 0, 0, 0] / 100
    assert np.ptp(found.reshape(900, -1), axis=1).max() < 0.6
    assert 0.69 < factor.min() < 0.72 and 1.28 < factor.max() < 1.31
    assert abs(np.histogram(factor, 3, (0.7, 1.3))[0] / 900 - 1 / 3).max() < 0.06


def test_jitter_changes_contrast_and_saturation_apart_and_in_any_order():
    picture = tf.constant(PICTURES[3] // 2 + 50, tf.float32)
    found = several(lambda seed: colors.color_jitter(picture, seed, 0.4), 300)
    brightness = found.mean(-1).mean((1, 2)) / picture.numpy().mean()
    chroma = found.std(-1).mean((1, 2)) / picture.numpy().std(-1).mean() / brightness
    light = found.mean(-1).std((1, 2)) / picture.numpy().mean(-1).std() / brightness
    for ratio in (brightness, light, chroma):
        assert ratio.min() < 0.75 and ratio.max() > 1.25
    assert abs(np.corrcoef(brightness, light)[0, 1]) < 0.3
    factors = {}
    for i in range(25):  # the same factors by hand, in each of the orders
        seed = tf.constant([i, 7], tf.int64)
        seeds = tf.random.split(tf.random.fold_in(seed, colors.JITTER))
        b, c, s = tf.random.stateless_uniform((3,), seeds[0], 0.6, 1.4).numpy()
        steps = {
            "b": lambda x, b=b: colors.brightness(x, b),
            "c": lambda x, c=c: colors.contrast(x, c),
            "s": lambda x, s=s: colors.saturation(x, s),
        }
        for order in ("bcs", "bsc", "cbs", "csb", "sbc", "scb"):
            x = picture
            for name in order:
                x = steps[name](x)
            if np.abs(found[i] - x).max() < 1e-3:
                factors.setdefault(i, []).append(order)
    assert len(factors) == 25
    # Saturation changes places with the others and leaves the same.
    assert {x[0] for x in factors.values()} == {"bcs", "cbs"}


def erased(probability, count=600, size=(40, 60)):
    """Images of 5000, brighter than any noise, as they become, and where noise is."""
    image = tf.fill((*size, 3), 5000.0)
    found = several(
        lambda seed: erasing.random_erasing(image, seed, probability), count
    )
    return found, found != 5000


def test_erasing_fills_one_box_with_noise_of_the_mean_and_deviation_of_imagenet():
    images, noise = erased(1.0)
    assert (noise == noise[..., :1]).all()  # all channels of a pixel
    noise = noise[..., 0]
    rows, columns = noise.any(2).sum(1), noise.any(1).sum(1)
    np.testing.assert_array_equal(noise.sum((1, 2)), rows * columns)  # a box, whole
    for rank, (mean, deviation) in enumerate(
        zip((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), strict=True)
    ):
        pixels = images[noise][:, rank]
        assert abs(pixels.mean() - mean) < 0.5 and abs(pixels.std() - deviation) < 0.5
    first = images[0][noise[0]]  # pixels and channels differ from one another
    assert len(np.unique(first)) == first.size
    assert abs(np.corrcoef(first.T)[0, 1]) < 0.3


def test_area_ratio_and_place_of_an_erased_box_are_spread_as_they_should():
    """Boxes that fit by any ratio, so that no draw is made again."""
    image = tf.fill((300, 300, 3), 5000.0)

    def draw(seed):
        noise = (
            erasing.random_erasing(image, seed, 1.0, (0.02, 0.25), (0.5, 2.0))[..., 0]
            < 5e3
        )
        rows = tf.where(tf.reduce_any(noise, 1))[:, 0]
        columns = tf.where(tf.reduce_any(noise, 0))[:, 0]
        return tf.stack([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])

    top, bottom, left, right = several(draw, 400).T
    height, width = bottom - top, right - left
    for x, low, high in (
        (height * width / 90_000, 0.02, 0.25),
        (np.log(height / width), math.log(0.5), math.log(2)),
        (top / (300 - height), 0, 1),
        (left / (300 - width), 0, 1),
    ):
        assert low - 0.02 < x.min() and x.max() < high + 0.02
        parts = np.histogram(np.clip(x, low, high), 4, (low, high))[0] / len(x)
        assert np.abs(parts - 0.25).max() < 0.08


def test_as_many_images_are_erased_as_the_probability_says():
    for probability in (0.0, 0.25, 1.0):
        images, noise = erased(probability, 500)
        happened = noise.any((1, 2, 3))
        assert abs(happened.mean() - probability) < 0.05
        assert (images[~happened] == 5000).all()
    area = noise[..., 0].mean((1, 2))
    assert 0.015 < area.min() < 0.05 and 0.28 < area.max() < 0.35


def test_where_no_box_fits_nothing_is_erased():
    _, noise = erased(1.0, 100, (1, 300))
    assert not noise.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda seed: colors.rand_augment(tf.constant(PICTURES[3], tf.float32), seed),
        lambda seed: colors.three_augment(tf.constant(PICTURES[3], tf.float32), seed),
        lambda seed: erasing.random_erasing(flat(), seed, 1.0),
        lambda seed: colors.color_jitter(
            tf.constant(PICTURES[3], tf.float32), seed, 0.3
        ),
    ],
    ids=["rand_augment", "three_augment", "erasing", "color_jitter"],
)
def test_the_seed_decides_the_colours(change):
    first, again = several(change, 30), several(change, 30)
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first.round(2).reshape(30, -1), axis=0)) > 10
