"""Augmentation by colours and by erasing, one image at a time, from a seed alone.

Nothing here moves a pixel, so labels, masks and score maps stay as they are. Images are
float32 `(H, W, 3)` of 0..255, and so is what comes back. Where Pillow's operations, by
which timm augments, round each result to whole numbers, these do not.

A seed is int64 `(2,)`, its streams are those of `training.augment`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from keras_vit.embedding import NORMALIZATIONS
from training.augment import ATTEMPTS, COLORS, ERASING, JITTER, rand_augment_draws

GREY = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601
BLUR = (0.1, 2.0)  # smallest and largest radius of 3-Augment, pixels
BLUR_WIDTH = 8  # pixels to either side, 4 deviations of the largest
# Mean and deviation of red, green and blue, of 0..255
IMAGENET = [[255 * x for x in row] for row in NORMALIZATIONS["imagenet"]]


def auto_contrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel so that its darkest pixel is 0 and its brightest 255."""
    low = tf.reduce_min(image, axis=(0, 1))
    span = tf.reduce_max(image, axis=(0, 1)) - low
    flat = span < 1
    stretched = (image - low) * (255 / tf.where(flat, 1.0, span))
    return tf.where(flat, image, stretched)


def equalize(image: tf.Tensor) -> tf.Tensor:
    """Spread each channel, in whole numbers, so that all values are equally common.

    A value goes to the number of pixels below it, in steps of the size that brings the
    largest to 255; what is the size of a step is not spread, as in Pillow.
    """
    values = tf.cast(tf.round(image), tf.int32) + tf.constant([0, 256, 512])
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
    return tf.cast(tf.gather(tf.reshape(table, [-1]), values), tf.float32)


def invert(image: tf.Tensor) -> tf.Tensor:
    """255 - x."""
    return 255 - image


def posterize(image: tf.Tensor, bits: tf.Tensor) -> tf.Tensor:
    """Keep the first bits, 0..8, of the 8 of each whole number."""
    step = tf.pow(2.0, 8 - tf.cast(bits, tf.float32))
    return tf.floor(tf.round(image) / step) * step


def solarize(image: tf.Tensor, threshold: tf.Tensor) -> tf.Tensor:
    """Invert what is as bright as the threshold, 0..256, or brighter."""
    threshold = tf.cast(threshold, tf.float32)
    return tf.where(tf.round(image) < threshold, image, 255 - image)


def solarize_add(image: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """Make what is darker than 128 brighter by an amount."""
    brighter = tf.minimum(image + tf.cast(amount, tf.float32), 255)
    return tf.where(tf.round(image) < 128, brighter, image)


def grey(image: tf.Tensor) -> tf.Tensor:
    """The brightness of each pixel in all three channels."""
    return tf.broadcast_to(_brightness(image), tf.shape(image))


def saturation(image: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Blend with the grey image: 0 is grey, 1 no change, more is more colourful."""
    return _blend(_brightness(image), image, factor)


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
    ops, shares = rand_augment_draws(seed, 1, **amounts)
    steps = [lambda x, _: x, *OPERATIONS.values()]
    for op, share in zip(tf.unstack(ops), tf.unstack(shares), strict=True):
        image = _one_of(steps, op[0] - 4, image, share[0])
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
    choice, place = tf.unstack(
        tf.random.stateless_uniform((2,), tf.random.fold_in(seed, COLORS))
    )
    radius = BLUR[0] + place * (BLUR[1] - BLUR[0])
    steps = [
        lambda x, _: grey(x),
        lambda x, _: solarize(x, 128),
        gaussian_blur,
    ]
    return _one_of(steps, tf.cast(choice * 3, tf.int32), image, radius)


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
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, JITTER)))
    factors = tf.random.stateless_uniform((3,), seeds[0], 1 - amount, 1 + amount)
    order = tf.argsort(tf.random.stateless_uniform((3,), seeds[1]))
    steps = brightness, contrast, saturation
    for i in tf.unstack(order):
        image = _one_of(steps, i, image, factors[i])
    return image


def random_erasing(
    image: tf.Tensor,
    seed: tf.Tensor,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> tf.Tensor:
    """Fill one box of an image with noise, or leave the image as it is.

    The area of the box is uniform in `area`, the logarithm of height / width in that of
    `ratio`, and its place among those where it fits. The first of ten draws that is
    smaller than the image on both sides is taken; where none is, nothing is erased. The
    noise is normal, apart for each pixel and channel, with the mean and the deviation
    of ImageNet's pixels: what a model that normalises by these sees is N(0, 1).

    Source: Zhong et al. 2017, "Random Erasing Data Augmentation",
    https://arxiv.org/abs/1708.04896; noise and draws are those of timm's mode "pixel",
    https://github.com/huggingface/pytorch-image-models, `timm/data/random_erasing.py`.
    Differs from timm in that the image is not normalised yet, as our models do that
    themselves: so the noise is in 0..255, and is not cut to it.

    Args:
        image: float32 `(H, W, 3)` of 0..255.
        seed: int64 `(2,)`.
        probability: How often a box is erased.
        area: Least and largest area of the box, as a fraction of the image's.
        ratio: Least and largest height / width of the box, in pixels.

    Returns:
        `(H, W, 3)`.
    """
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, ERASING), 5))
    whole = tf.shape(image)[:2]
    sides = tf.cast(whole, tf.float32)
    part = tf.random.stateless_uniform((ATTEMPTS,), seeds[0], *area)
    logarithms = [math.log(limit) for limit in ratio]
    aspect = tf.exp(tf.random.stateless_uniform((ATTEMPTS,), seeds[1], *logarithms))
    pixels = part * tf.reduce_prod(sides)
    sizes = tf.round(tf.sqrt(tf.stack([pixels * aspect, pixels / aspect], -1)))
    fits = tf.reduce_all((sizes >= 1) & (sizes < sides), axis=-1)
    happens = tf.random.stateless_uniform((), seeds[2]) < probability
    size = sizes[tf.argmax(tf.cast(fits, tf.int32))]  # the first that fits
    offset = tf.floor(tf.random.stateless_uniform((2,), seeds[3]) * (sides - size + 1))

    def erased():
        box, start = tf.cast(size, tf.int32), tf.cast(offset, tf.int32)
        shape = tf.concat([box, [3]], 0)
        noise = tf.random.stateless_normal(shape, seeds[4], IMAGENET[0], IMAGENET[1])
        around = tf.stack([start, whole - start - box], -1)  # before and after
        around = tf.concat([around, [[0, 0]]], 0)
        inside = tf.pad(tf.ones(shape), around) > 0
        return tf.where(inside, tf.pad(noise, around), image)

    return tf.cond(happens & tf.reduce_any(fits), erased, lambda: image)


def _one_of(
    steps: Sequence[Callable], choice: tf.Tensor, image: tf.Tensor, amount: tf.Tensor
) -> tf.Tensor:
    """Do one of the steps, and compute no other; the first for a negative choice."""
    branches = [functools.partial(step, image, amount) for step in steps]
    result = tf.switch_case(tf.maximum(choice, 0), branches)
    return tf.ensure_shape(result, image.shape)
