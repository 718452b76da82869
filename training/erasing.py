"""Random erasing: a box of an image becomes noise, from a seed alone.

Nothing here moves a pixel, so labels, masks and score maps stay as they are. Images are
float32 `(H, W, 3)` of 0..255. A seed is int64 `(2,)`, its streams are those of
`training.augment`.
"""

import math

import tensorflow as tf

from keras_vit.embedding import NORMALIZATIONS
from training.augment import ATTEMPTS, ERASING
from training.colors import along, rows_of

AREA = (0.02, 1 / 3)  # of a box that is erased, as a part of the image
RATIO = (0.3, 1 / 0.3)  # of its height to its width
# Mean and deviation of red, green and blue, of 0..255
IMAGENET = [[255 * x for x in row] for row in NORMALIZATIONS["imagenet"]]


def random_erasing(
    image: tf.Tensor,
    seed: tf.Tensor,
    probability: float,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
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
    size = tf.shape(image)[:2]
    boxes, seeds = random_erasing_draws(seed, 1, size, probability, area, ratio)
    return erased(image, boxes[0], seeds[0])


def random_erasing_draws(
    seed: tf.Tensor,
    batch: tf.Tensor,
    whole: tf.Tensor,
    probability: float,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The boxes erased of B images of `whole` (H, W), and the seeds of their noise.

    Args are those of `random_erasing`.

    Returns:
        `(top, left, height, width)`, int32 `(B, 4)`, all 0 for none; int64 `(B, 2)`.
    """
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, ERASING), 5))
    sides = tf.cast(whole, tf.float32)
    part = tf.random.stateless_uniform((batch, ATTEMPTS), seeds[0], *area)
    logarithms = [math.log(limit) for limit in ratio]
    aspect = tf.random.stateless_uniform((batch, ATTEMPTS), seeds[1], *logarithms)
    aspect = tf.exp(aspect)
    pixels = part * tf.reduce_prod(sides)
    sizes = tf.round(tf.sqrt(tf.stack([pixels * aspect, pixels / aspect], -1)))
    fits = tf.reduce_all((sizes >= 1) & (sizes < sides), axis=-1)
    first = tf.argmax(tf.cast(fits, tf.int32), axis=1)
    size = tf.gather(sizes, first, batch_dims=1)
    place = tf.random.stateless_uniform((batch, 2), seeds[3])
    boxes = tf.concat([tf.floor(place * (sides - size + 1)), size], 1)
    happens = tf.random.stateless_uniform((batch,), seeds[2]) < probability
    happens &= tf.reduce_any(fits, axis=1)
    noise = tf.random.stateless_uniform((batch, 2), seeds[4], None, None, tf.int64)
    return tf.where(happens[:, None], tf.cast(boxes, tf.int32), 0), noise


def erased(image: tf.Tensor, box: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """An image with noise in a box.

    Args:
        image: float32 `(H, W, 3)`.
        box: `(top, left, height, width)`, int32; of no height for none.
        seed: Of the noise.

    Returns:
        `(H, W, 3)`.
    """

    def filled():
        top, left, height, width = tf.unstack(box)
        noise = tf.random.stateless_normal((height, 3 * width), seed)
        noise *= along(tf.constant(IMAGENET[1]), noise)
        noise += along(tf.constant(IMAGENET[0]), noise)
        rows = rows_of(image)
        beside = rows[top : top + height]
        inner = [beside[:, : 3 * left], noise, beside[:, 3 * (left + width) :]]
        parts = [rows[:top], tf.concat(inner, 1), rows[top + height :]]
        return tf.reshape(tf.concat(parts, 0), tf.shape(image))

    result = tf.cond(box[2] > 0, filled, lambda: image)
    return tf.ensure_shape(result, image.shape)
