"""Augmentation by geometry, from a seed alone.

Where each image came from is told by a matrix: `matrices`, float32 `(B, 3, 3)`, take a
point of the output `(x, y, 1)` to its place in the input. Both are in unit coordinates:
x runs from 0 at the left edge of the picture to 1 at the right, y from 0 at the top to
1 at the bottom, and the centre of pixel i of W lies at (i + 0.5) / W. Steps compose by
multiplication, the first step leftmost:

    place in the file = crop @ flip @ rand_augment @ affine @ point

so that masks (`warp_masks`) and score maps (`training.targets.token_labels`) can follow
their image through all of it at once.

A seed is int64 `(2,)`; the same seed draws the same. One seed may be given to several
functions: each draws from a stream of its own.

Shapes: B images of H x W pixels and C channels.
"""

import functools
import math

import numpy as np
import tensorflow as tf

from keras_vit.embedding import Preprocess
from keras_vit.encoder import unknown
from training.box import decode_box
from training.preprocess import crop_matrix, scaled
from training.slide import slid

# Streams of a seed; `affines` has the bare one.
CROP, FLIP, RAND_AUGMENT, MIX, SCALING, ERASING, COLORS, JITTER = range(8)
ATTEMPTS = 10
INTERPOLATIONS = ("bilinear", "bicubic")
RAND_AUGMENT_OPS = 15  # of which the first five are the geometric ones:
IDENTITY = np.eye(3, dtype="float32")
MIRROR = np.array([[-1, 0, 1], [0, 1, 0], [0, 0, 1]], "float32")  # left for right
LARGEST = {  # at the highest level; the others are those of `training.colors`
    "rotate": math.radians(30),
    "shear_x": 0.3,  # pixels to the side for each pixel down
    "shear_y": 0.3,
    "translate_x": 0.45,  # of the width
    "translate_y": 0.45,  # of the height
}


def random_resized_crop(
    file: tf.Tensor,
    preprocess: Preprocess,
    seed: tf.Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cut a random part out of one image file and resize it, antialiased.

    No more of the file is decoded than that part, where it is a JPEG.

    The area is uniform in `scale`, the logarithm of width / height in that of `ratio`,
    and the place among those where the crop fits. The first of ten draws whose size
    fits is taken; where none does, the largest central crop within `ratio`.

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions",
    https://arxiv.org/abs/1409.4842; the ten draws and what follows them are those of
    torchvision's RandomResizedCrop.

    Args:
        file: JPEG, PNG, GIF or BMP, scalar string; or an image `(h, w, C)` of 0..255.
        preprocess: Size and interpolation of the result; its `crop_ratio` has no part.
        seed: int64 `(2,)`.
        scale: Least and largest area of the crop, as a fraction of the image's.
        ratio: Least and largest width / height of the crop, in pixels of the image.
        interpolation: `"bilinear"`, `"bicubic"`, or `"random"` for one of the two,
            drawn for each image; None for the one of `preprocess`.

    Returns:
        float32 `(H, W, C)` of 0..255, and the matrix of the crop, `(3, 3)`.

    Raises:
        ValueError: If a limit is not positive, or the lower above the higher, or the
            interpolation is unknown.
    """
    draws = crop_draws(seed, 1, scale, ratio)[0]
    return drawn_crop(file, preprocess, draws, ratio, interpolation)


def crop_draws(
    seed: tf.Tensor,
    batch: tf.Tensor,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tf.Tensor:
    """What `drawn_crop` needs for each image: `(B, 12, 2)`.

    Ten times height and width, of an image of area 1; a place among those where the
    crop fits, of 0..1; and a number of 0..1, twice, that chooses the interpolation.
    """
    for name, (low, high) in (("scale", scale), ("ratio", ratio)):
        if not 0 < low <= high:
            raise ValueError(
                f"{name} must be two limits, 0 < low <= high, got {low} and {high}."
            )

    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, CROP), 3))
    area = tf.random.stateless_uniform((batch, ATTEMPTS), seeds[0], *scale)
    logarithms = [math.log(limit) for limit in ratio]
    aspect = tf.random.stateless_uniform((batch, ATTEMPTS), seeds[1], *logarithms)
    aspect = tf.exp(aspect)
    sides = tf.sqrt(tf.stack([area / aspect, area * aspect], -1))
    place = tf.random.stateless_uniform((batch, 1, 2), seeds[2])
    chosen = tf.random.stateless_uniform(
        (batch, 1, 1), tf.random.fold_in(seed, SCALING)
    )
    return tf.concat([sides, place, tf.tile(chosen, (1, 1, 2))], 1)


def drawn_crop(
    file: tf.Tensor,
    preprocess: Preprocess,
    draws: tf.Tensor,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """`random_resized_crop` of what `crop_draws` drew for one image, `(12, 2)`."""
    if interpolation not in (None, *INTERPOLATIONS, "random"):
        known = (*INTERPOLATIONS, "random", None)
        raise ValueError(unknown("interpolation", interpolation, known))

    def choose(whole):
        whole = tf.cast(whole, tf.float32)
        sizes = tf.round(tf.sqrt(tf.reduce_prod(whole)) * draws[:ATTEMPTS])
        fits = tf.reduce_all((sizes >= 1) & (sizes <= whole), axis=-1)
        found = tf.reduce_any(fits)
        first = tf.argmax(tf.cast(fits, tf.int32))
        largest = tf.round(whole[::-1] * [1 / ratio[0], ratio[1]])
        largest = tf.clip_by_value(largest, 1.0, whole)
        size = tf.where(found, sizes[first], largest)
        room = whole - size
        random, central = draws[ATTEMPTS] * (room + 1), room / 2
        return tf.floor(tf.where(found, random, central)), size

    if file.dtype == tf.string:
        crop, offset, size, whole = decode_box(file, choose)
    else:
        whole = tf.shape(file)[:2]
        offset, size = choose(whole)
        box = tf.unstack(tf.cast(tf.concat([offset, size], 0), tf.int32))
        top, left, height, width = box
        crop = file[top : top + height, left : left + width]
    if interpolation == "random":
        bilinear, bicubic = (
            functools.partial(scaled, crop, preprocess.image_size, name)
            for name in INTERPOLATIONS
        )
        crop = tf.cond(draws[-1, 0] < 0.5, bilinear, bicubic)
    else:
        interpolation = interpolation or preprocess.interpolation
        crop = scaled(crop, preprocess.image_size, interpolation)
    return crop, crop_matrix(offset, size, whole)


def flips(seed: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
    """Matrices that mirror half of the images, left for right: `(B, 3, 3)`.

    Args:
        seed: int64 `(2,)`.
        batch: B.
    """
    draw = tf.random.stateless_uniform((batch,), tf.random.fold_in(seed, FLIP))
    return tf.where(draw[:, None, None] < 0.5, MIRROR, IDENTITY)


def affines(
    seed: tf.Tensor,
    batch: tf.Tensor,
    image_size: tuple[int, int],
    rotation_degrees: float = 0.0,
    zoom: float = 0.0,
    shift: float = 0.0,
) -> tf.Tensor:
    """Matrices that rotate, zoom and shift each image by its own random amount.

    Every amount is uniform between its two extremes. The image turns about its middle.

    Args:
        seed: int64 `(2,)`.
        batch: B.
        image_size: `(H, W)` of the images.
        rotation_degrees: Largest angle to either side.
        zoom: Largest change of the side length, as a fraction of it.
        shift: Largest shift along either axis, as a fraction of the side.

    Returns:
        `(B, 3, 3)`.
    """
    draw = tf.random.stateless_uniform((4, batch), seed, -1.0, 1.0)
    angle = draw[0] * math.radians(rotation_degrees)
    scale = 1.0 + draw[1] * zoom
    cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
    right, down = draw[2] * shift, draw[3] * shift
    return _matrices(cosine, -sine, sine, cosine, right, down, 0.5, image_size)


def rand_augment_draws(
    seed: tf.Tensor,
    batch: tf.Tensor,
    num_ops: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Which operations of RandAugment each image gets, and how much of them.

    For each image `num_ops` times one of 15 operations is drawn, with replacement, and
    done with probability 1/2, at a level that is normal with mean `magnitude`, cut to
    0..10, to either side. As in timm a magnitude of 15 is hardly more than one of 10.

    Source: Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with
    a reduced search space", https://arxiv.org/abs/1909.13719; operations, probability
    and random level are those of timm's `rand-m9-mstd0.5-inc1`,
    https://github.com/huggingface/pytorch-image-models, `timm/data/auto_augment.py`.

    Args:
        seed: int64 `(2,)`.
        batch: B.
        num_ops: Operations an image.
        magnitude: Mean of the level; 10 is the highest.
        deviation: Standard deviation of the level.

    Returns:
        Number of each operation, int32 `(num_ops, B)`: 0..4 one of `LARGEST`, 5..14 one
        of `training.colors.OPERATIONS`, -1 none; and level / 10 with its sign, float32
        `(num_ops, B)` of -1..1.

    Raises:
        ValueError: If a number is out of its range.
    """
    if not (isinstance(num_ops, int) and num_ops >= 0):
        raise ValueError(f"num_ops must be an int >= 0, got {num_ops!r}.")
    for name, value in (("magnitude", magnitude), ("deviation", deviation)):
        if not value >= 0:
            raise ValueError(f"{name} must be a number >= 0, got {value}.")
    seeds = tf.unstack(tf.random.split(tf.random.fold_in(seed, RAND_AUGMENT)))
    draw = tf.random.stateless_uniform((3, num_ops, batch), seeds[0])
    level = tf.random.stateless_normal((num_ops, batch), seeds[1], magnitude, deviation)
    amount = tf.clip_by_value(level, 0.0, 10.0) / 10
    amount *= tf.where(draw[1] < 0.5, -1.0, 1.0)
    op = tf.cast(draw[0] * RAND_AUGMENT_OPS, tf.int32)
    return tf.where(draw[2] < 0.5, -1, op), amount


def rand_augment_geometry(
    seed: tf.Tensor,
    batch: tf.Tensor,
    image_size: tuple[int, int],
    num_ops: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
) -> tf.Tensor:
    """Matrices of RandAugment: its operations that move pixels.

    Five of the 15 are geometric: rotation by up to 30 degrees, shear along x or y by up
    to 0.3, translation along x or y by up to 0.45 of the side, each to either side. For
    the other ten, which `training.colors.rand_augment` does, nothing moves. What is
    drawn, and the source, is told in `rand_augment_draws`.

    As in timm a rotation is about the middle of the image, but a shear leaves the top
    (along x) or left (along y) edge in place, so it shifts the image as well.

    Differs from timm in that all of them are one interpolation, so that what the first
    moves out of the image the second may bring back, in that those on colours come
    first, whatever their order, and in that `warp` fetches 0 from outside, which so has
    no colour, not the mean colour.

    Args:
        seed: int64 `(2,)`.
        batch: B.
        image_size: `(H, W)` of the images.
        num_ops: Operations an image.
        magnitude: Mean of the level; 10 is the highest.
        deviation: Standard deviation of the level.

    Returns:
        `(B, 3, 3)`.

    Raises:
        ValueError: If a number is out of its range.
    """
    draws = rand_augment_draws(seed, batch, num_ops, magnitude, deviation)
    return rand_augment_matrices(*draws, image_size)


def rand_augment_matrices(
    op: tf.Tensor, amount: tf.Tensor, image_size: tuple[int, int]
) -> tf.Tensor:
    """Matrices `(B, 3, 3)` of what `rand_augment_draws` gave."""
    chosen = tf.one_hot(op, len(LARGEST)) * list(LARGEST.values())
    amounts = tf.unstack(amount[..., None] * chosen, axis=-1)
    angle, shear_x, shear_y, right, down = amounts  # all but one are 0
    cosine, sine = tf.cos(angle), tf.sin(angle)
    centre = tf.where(angle == 0, 0.0, 0.5)
    steps = _matrices(
        cosine, shear_x - sine, shear_y + sine, cosine, right, down, centre, image_size
    )  # (num_ops, B, 3, 3)
    start = tf.eye(3, batch_shape=[tf.shape(op)[1]])
    return functools.reduce(tf.matmul, tf.unstack(steps), start)


def _matrices(xx, xy, yx, yy, right, down, centre, image_size):
    """Matrices that map [x, y] to [[xx, xy], [yx, yy]] @ [x, y] about a centre.

    The four are in pixels, so that a rotation keeps angles where H and W differ; the
    shift `right`, `down` and the centre (the same on both axes) in unit coordinates.
    Each may have any shape; the result has it before its `(3, 3)`.
    """
    height, width = image_size
    xy, yx = xy * (height / width), yx * (width / height)
    right = right + centre * (1 - xx - xy)
    down = down + centre * (1 - yx - yy)
    zero, one = tf.zeros_like(xx), tf.ones_like(xx)
    rows = [xx, xy, right], [yx, yy, down], [zero, zero, one]
    return tf.stack([tf.stack(row, axis=-1) for row in rows], axis=-2)


def warp(images: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Fetch each pixel from where its matrix says, bilinear; 0 from outside.

    Args:
        images: float32 `(B, H, W, C)`, H and W static.
        matrices: `(B, 3, 3)`, affine.

    Returns:
        `(B, H, W, C)`.
    """

    spec = tf.TensorSpec(images.shape[1:], images.dtype)
    pairs = (images, matrices)
    return tf.map_fn(lambda pair: warp_one(*pair), pairs, fn_output_signature=spec)


def warp_one(image: tf.Tensor, matrix: tf.Tensor) -> tf.Tensor:
    """`warp` of one image `(H, W, C)`; quick unless it moves along both axes."""
    mirrored = matrix[0, 0] < 0
    image = tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)
    matrix = tf.where(mirrored, MIRROR @ matrix, matrix)
    moved = matrix != IDENTITY
    along_x, along_y = (
        ~tf.reduce_any(moved & ~np.isin(np.arange(9), free).reshape(3, 3))
        for free in ((1, 2), (3, 5))
    )

    return tf.case(
        [
            (along_x & along_y, lambda: image),
            (along_x, lambda: slid(image, 0, matrix[0, 1], matrix[0, 2])),
            (along_y, lambda: slid(image, 1, matrix[1, 0], matrix[1, 2])),
        ],
        default=lambda: _warp(image[None], matrix[None], "BILINEAR", 0.0)[0],
    )


def warp_masks(masks: tf.Tensor, matrices: tf.Tensor) -> tf.Tensor:
    """Fetch each pixel of masks from where its matrix says, nearest; 255 from outside.

    Args:
        masks: Class of each pixel, uint8 `(B, H, W)`, H and W static.
        matrices: `(B, 3, 3)`, affine.

    Returns:
        `(B, H, W)`.
    """
    return _warp(masks[..., None], matrices, "NEAREST", 255.0)[..., 0]


def _warp(images, matrices, interpolation, outside):
    height, width = images.shape[1:3]
    sides = np.array([width, height, 1.0])
    matrices = matrices * tf.constant(sides[:, None] / sides, tf.float32)  # in pixels
    # The op counts from the centre of the first pixel, which lies at (0.5, 0.5).
    linear = matrices[:, :2, :2]
    offset = matrices[:, :2, 2] + (tf.reduce_sum(linear, axis=-1) - 1) / 2
    rows = tf.concat([linear, offset[..., None]], axis=-1)  # (B, 2, 3)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.pad(tf.reshape(rows, (-1, 6)), [[0, 0], [0, 2]]),
        output_shape=[height, width],
        fill_value=outside,
        interpolation=interpolation,
        fill_mode="CONSTANT",
    )
