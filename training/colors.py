"""Augmentation by colours, one image at a time, from a seed alone.

Nothing here moves a pixel, so labels, masks and score maps stay as they are. Images are
float32 `(H, W, 3)` of 0..255, and so is what comes back. Where Pillow's operations, by
which timm augments, round each result to whole numbers, these do not.

A seed is int64 `(2,)`, its streams are those of `training.augment`.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from training.augment import (
    COLORS,
    JITTER,
    LARGEST,
    rand_augment_draws,
)

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
BLUR = (0.1, 2.0)  # smallest and largest radius of 3-Augment, pixels
BLUR_WIDTH = 8  # pixels to either side, 4 deviations of the largest


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel so that its darkest pixel is 0 and its brightest 255."""
    rows = rows_of(image)
    low, high = (
        reduce(tf.reshape(reduce(rows, axis=0), (-1, 3)), axis=0)
        for reduce in (tf.reduce_min, tf.reduce_max)
    )
    flat = high - low < 1
    low = tf.where(flat, 0.0, low)
    scale = tf.where(flat, 1.0, 255 / (high - low))
    stretched = (rows - along(low, rows)) * along(scale, rows)
    return tf.reshape(stretched, tf.shape(image))


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Spread each channel, in whole numbers, so that all values are equally common.

    A value goes to the number of pixels below it, in steps of the size that brings the
    largest to 255; what is the size of a step is not spread, as in Pillow.
    """
    values = tf.cast(tf.round(rows_of(image)), tf.int32)
    values += along(tf.constant([0, 256, 512]), values)
    counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, (3, 256))
    numbers = tf.range(256)
    last = tf.reduce_max(tf.where(counts > 0, numbers, 0), axis=1)
    largest = tf.gather(counts, last, batch_dims=1)
    step = (tf.reduce_sum(counts, axis=1) - largest) // 255
    step = step[:, None]  # (3, 1)
    below = tf.cumsum(counts, axis=1, exclusive=True)
    table = (below + step // 2) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.minimum(table, 255), numbers)
    table = tf.cast(tf.reshape(table, [-1]), tf.float32)
    return tf.reshape(tf.gather(table, values), tf.shape(image))


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 - x."""
    return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the first bits, 0..8, of the 8 of each whole number."""
    step = tf.pow(2.0, 8 - tf.cast(bits, tf.float32))
    return tf.floor(tf.round(image) / step) * step


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert what is as bright as the threshold, 0..256, or brighter."""
    bright = tf.round(image) >= tf.cast(threshold, tf.float32)
    return image + tf.cast(bright, tf.float32) * (255 - 2 * image)


def solarize_add(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """Make what is darker than 128 brighter by an amount."""
    dark = tf.cast(tf.round(image) < 128, tf.float32)
    return tf.minimum(image + dark * tf.cast(amount, tf.float32), 255)


def grey(image: tf.Tensor) -> tf.Tensor:
    """The brightness of each pixel in all three channels."""
    return _with_colours(image, tf.constant([GREY] * 3))


def saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the grey image: 0 is grey, 1 no change, more is more colourful."""
    colours = (1 - factor) * tf.constant([GREY] * 3) + factor * tf.eye(3)
    return tf.clip_by_value(_with_colours(image, colours), 0, 255)


def contrast(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the mean brightness, as a whole number: 0 is flat, 1 no change."""
    mean = tf.floor(tf.reduce_mean(tf.round(_brightness(image))) + 0.5)
    return _blend(mean, image, factor)


def brightness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with black: 0 is black, 1 no change."""
    return _blend(0.0, image, factor)


def sharpness(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the smoothed image: 0 is smooth, 1 no change, more is sharper.

    Smoothing is the mean over 3 x 3 pixels, the middle one counting five times; the
    outermost pixels stay.
    """
    rows = image[:-2] + image[1:-1] + image[2:]
    squares = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = image[1:-1, 1:-1]
    away = inner - (squares + 4 * inner) / 13
    away = tf.pad(away, [[1, 1], [1, 1], [0, 0]])
    return tf.clip_by_value(image + (factor - 1) * away, 0, 255)


def gaussian_blur(image: tf.Tensor, radius: tf.Tensor) -> tf.Tensor:
    """Blur by a Gaussian of this deviation, in pixels; the border is repeated outwards.

    The Gaussian is cut at 8 pixels, so the radius is at most 2. Pillow comes near to it
    by three box filters.

    Args:
        image: float32 `(H, W, 3)`, H and W static.
        radius: Deviation, up to 2.
    """
    for axis, count in enumerate(image.shape[:2]):
        image = tf.tensordot(_blurring(count, radius), image, (1, axis))
        image = image if axis == 0 else tf.transpose(image, (1, 0, 2))
    return image


def _blurring(count, radius):
    """Matrix that blurs a line of `count` pixels: `(count, count)`."""
    steps = np.arange(-BLUR_WIDTH, BLUR_WIDTH + 1)
    weights = tf.exp(-(tf.constant(steps**2, tf.float32)) / (2 * radius**2))
    weights /= tf.reduce_sum(weights)
    row = np.arange(count)[:, None]
    column = np.clip(row + steps, 0, count - 1)  # the border repeated
    places = np.stack(np.broadcast_arrays(row, column), -1)  # (count, 17, 2)
    weights = tf.broadcast_to(weights, column.shape)
    return tf.scatter_nd(tf.constant(places, tf.int32), weights, (count, count))


def _brightness(image):
    return tf.tensordot(image, tf.constant(GREY), 1)[..., None]


def _with_colours(image, matrix):
    """Red, green and blue as sums of what they were, a row of the matrix for each."""
    pixels = tf.matmul(tf.reshape(image, (-1, 3)), matrix, transpose_b=True)
    return tf.reshape(pixels, tf.shape(image))


def rows_of(image):
    """`(H, 3 W)`: what goes along whole rows is done many numbers at a time."""
    return tf.reshape(image, (tf.shape(image)[0], -1))


def along(channels, rows):
    """A number for each channel, repeated along the rows of `rows_of`."""
    return tf.tile(channels, [tf.shape(rows)[1] // 3])


def _blend(zero, image, factor):
    """`zero` for a factor of 0, the image for 1, and on along this line."""
    return tf.clip_by_value(zero + factor * (image - zero), 0, 255)


def _factor(amount):
    return tf.maximum(1 + 0.9 * amount, 0.1)


def _up_to(largest, amount):
    return tf.floor(tf.abs(amount) * largest)


# The operations 5..14 of RandAugment: from an image and level / 10, -1..1, to an image.
OPERATIONS = {
    "auto_contrast": lambda image, amount: auto_contrast(image),
    "equalize": lambda image, amount: equalize(image),
    "invert": lambda image, amount: invert(image),
    "posterize": lambda image, amount: posterize(image, 4 - _up_to(4, amount)),
    "solarize": lambda image, amount: solarize(image, 256 - _up_to(256, amount)),
    "solarize_add": lambda image, amount: solarize_add(image, _up_to(110, amount)),
    "color": lambda image, amount: saturation(image, _factor(amount)),
    "contrast": lambda image, amount: contrast(image, _factor(amount)),
    "brightness": lambda image, amount: brightness(image, _factor(amount)),
    "sharpness": lambda image, amount: sharpness(image, _factor(amount)),
}


def rand_augment(image: tf.Tensor, seed: tf.Tensor, **amounts: float) -> tf.Tensor:
    """Do the operations of RandAugment that are on colours, in the order drawn.

    These are, at level l of 0..10: stretching and equalizing each channel, inverting,
    posterizing to 4 - 0.4 l bits, solarizing from 256 - 25.6 l on, adding 11 l to what
    is dark, and blending colour, contrast, brightness and sharpness by 1 +- 0.09 l. The
    others, for which nothing happens here, are `rand_augment_geometry` of the same seed
    and amounts, with a batch of 1.

    Args:
        image: float32 `(H, W, 3)` of 0..255.
        seed: int64 `(2,)`.
        **amounts: Those of `training.augment.rand_augment_draws`, which see for source
            and errors.

    Returns:
        `(H, W, 3)`.
    """
    draws = rand_augment_draws(seed, 1, **amounts)
    return done(image, "rand_augment", rand_augment_steps(*draws)[0])


def rand_augment_steps(op: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """What `rand_augment_draws` gave, as `done` takes it of an image: `(B, n, 2)`."""
    return tf.transpose(tf.stack([tf.cast(op, tf.float32), amount]), (2, 1, 0))


def done(image: tf.Tensor, name: str, steps: tf.Tensor) -> tf.Tensor:
    """Do steps that were drawn, one after the other.

    Args:
        image: float32 `(H, W, 3)` of 0..255, H and W static.
        name: Key of `STEPS`.
        steps: `(n, 2)`: number of each, and how much of it.

    Returns:
        `(H, W, 3)`.
    """
    known, first = STEPS[name]
    for number, amount in map(tf.unstack, tf.unstack(steps)):
        image = _one_of(known, tf.cast(number, tf.int32) - first, image, amount)
    return image


def three_augment(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Make an image grey, or solarize it from 128 on, or blur it by 0.1 to 2 pixels.

    One of the three, each as often as the others. The radius is uniform.

    Source: Touvron et al. 2022, "DeiT III: Revenge of the ViT", section 3,
    https://arxiv.org/abs/2204.07118.

    Args:
        image: float32 `(H, W, 3)` of 0..255, H and W static.
        seed: int64 `(2,)`.

    Returns:
        `(H, W, 3)`.
    """
    return done(image, "three_augment", three_augment_draws(seed, 1)[0])


def three_augment_draws(seed: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Which of the three each image gets, and the radius: `(B, 1, 2)`."""
    draws = tf.random.stateless_uniform((2, batch, 1), tf.random.fold_in(seed, COLORS))
    radius = BLUR[0] + draws[1] * (BLUR[1] - BLUR[0])
    return tf.stack([tf.floor(draws[0] * 3), radius], -1)


def color_jitter(image: tf.Tensor, seed: tf.Tensor, amount: float) -> tf.Tensor:
    """Change brightness, contrast and saturation, in random order.

    Each is multiplied by a factor that is uniform in 1 - amount .. 1 + amount.

    Source: torchvision's `ColorJitter(amount, amount, amount)`.

    Args:
        image: float32 `(H, W, 3)` of 0..255.
        seed: int64 `(2,)`.
        amount: Largest change of a factor, 0 to below 1.

    Returns:
        `(H, W, 3)`.
    """
    return done(image, "color_jitter", color_jitter_draws(seed, 1, amount)[0])


def color_jitter_draws(seed: tf.Tensor, batch: tf.Tensor, amount: float) -> tf.Tensor:
    """Which of the three come in which order, and their factors: `(B, 3, 2)`."""
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, JITTER)))
    factors = tf.random.stateless_uniform((batch, 3), seeds[0], 1 - amount, 1 + amount)
    order = tf.argsort(tf.random.stateless_uniform((batch, 3), seeds[1]))
    factors = tf.gather(factors, order, batch_dims=1)
    return tf.stack([tf.cast(order, tf.float32), factors], -1)


def _one_of(
    steps: Sequence[Callable], choice: tf.Tensor, image: tf.Tensor, amount: tf.Tensor
) -> tf.Tensor:
    """Do one of the steps, and compute no other; the first for a negative choice."""
    branches = [functools.partial(step, image, amount) for step in steps]
    result = tf.switch_case(tf.maximum(choice, 0), branches)
    return tf.ensure_shape(result, image.shape)


# By what draws them: the steps on colours, and the number of the first in the draws.
STEPS = {
    "rand_augment": (
        (lambda image, _: image, *OPERATIONS.values()),
        len(LARGEST) - 1,  # below are those that are none or geometric
    ),
    "three_augment": (
        (
            lambda image, _: grey(image),
            lambda image, _: solarize(image, 128),
            gaussian_blur,
        ),
        0,
    ),
    "color_jitter": ((brightness, contrast, saturation), 0),
}
