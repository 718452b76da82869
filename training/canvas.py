"""Digits on a noisy canvas, with a label that is exact for every token.

Real digits in a composed picture: what it shows is one digit, what a token shows is
known without an annotator.
"""

import hashlib

import numpy as np
import tensorflow as tf

from training.data import Dataset
from training.digits import read_digits
from training.scenes import SPLITS, enlarge, png

SIZES = (16, 256)  # smallest and largest side of a canvas, pixels
SIDES = (3 / 8, 5 / 8)  # smallest and largest side of a digit, of that of the canvas
NOISE_SHIFT = 2  # the background is uniform in 0..255 >> 2, that is 0..63


def load_canvas(name: str, size: int) -> Dataset:
    """Each digit of scikit-learn once, at a random place of a canvas of noise.

    The digit keeps its proportions, is scaled bilinearly to a random side and lies
    whole on the canvas: it is added to the noise, as far as 255. Its square is its
    score map: probability 1 inside, no label outside. So the label of a token is its
    digit by the part of the token that the square covers, and for the rest all classes
    alike.

    Args:
        name: Name of the dataset.
        size: Side of the canvas, in pixels.

    Returns:
        `Dataset` of 1,437 training and 360 validation images, with `label_maps`.

    Raises:
        ValueError: If `size` is not in 16..256.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(
            f"The side of a canvas must be in {SIZES[0]}..{SIZES[1]} pixels, "
            f"got {size}."
        )
    digits = read_digits()
    digest = hashlib.sha256()
    parts = {}
    for seed, (part, split) in enumerate(SPLITS.items()):
        random = np.random.default_rng([seed, size])
        images, squares = [], []
        for digit in digits[split][0]:
            image, square = place_digit(digit, size, random)
            digest.update(image.tobytes() + square.tobytes())
            images.append(png(image))
            squares.append(square)
        parts[part] = images, digits[split][1].astype("int64"), np.stack(squares)

    def stream(part):
        images, labels, _ = parts[part]
        return tf.data.Dataset.from_tensor_slices((images, labels))

    def score_map(label, square):
        top, left, side = tf.unstack(square)
        pixels = tf.range(size)
        rows = (pixels >= top) & (pixels < top + side)
        columns = (pixels >= left) & (pixels < left + side)
        inside = tf.cast(rows[:, None] & columns, tf.float16)[..., None]
        return inside, tf.fill((size, size, 1), tf.cast(label, tf.int32))

    def label_maps():
        _, labels, squares = parts["train"]
        return tf.data.Dataset.from_tensor_slices((labels, squares)).map(score_map)

    return Dataset(
        name=name,
        labels=tuple("0123456789"),
        sizes={part: len(images) for part, (images, _, _) in parts.items()},
        stream=stream,
        read=lambda handle: handle,
        shuffle_buffer=len(parts["train"][0]),
        fingerprint=digest.hexdigest(),
        image_size=(size, size),
        label_maps=label_maps,
        whole=True,
    )


def place_digit(
    digit: np.ndarray, size: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one canvas.

    Args:
        digit: uint8 `(8, 8)`.
        size: S, side of the canvas, in pixels.
        random: Where the random numbers come from.

    Returns:
        Image, uint8 `(S, S)`; top, left and side of the digit's square, int32 `(3,)`.
    """
    low, high = (round(size * part) for part in SIDES)
    side = random.integers(low, high + 1)
    top, left = random.integers(0, size - side + 1, 2)
    image = random.integers(0, 256, (size, size)) >> NOISE_SHIFT
    image[top : top + side, left : left + side] += enlarge(digit, side)
    image = np.minimum(image, 255).astype("uint8")
    return image, np.array([top, left, side], "int32")
