"""Scenes for segmentation: real digits pasted on a larger canvas, made in memory."""

import functools
import hashlib

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from training.data import Dataset
from training.digits import read_digits

COUNTS = {"train": 2000, "validation": 300}  # scenes
SPLITS = {"train": "train", "validation": "test"}  # whose digits a part shows
SIZES = (32, 256)  # smallest and largest side of a canvas, pixels
DIGITS = (2, 5)  # fewest and most digits on a canvas of 64 x 64; by area elsewhere
SIDES = (14, 24)  # smallest and largest side of a pasted digit, pixels
NOISE_SHIFT = 3  # the background is uniform in 0..255 >> 3, that is 0..31
THRESHOLD = 80  # a pixel of 0..255 belongs to the digit from here on
ATTEMPTS = 50  # places tried for a digit before it is left out


def load_scenes(name: str, size: int) -> Dataset:
    """Scenes of `size` x `size` pixels with a class for each pixel.

    A digit keeps its proportions, is scaled bilinearly to a random side and stands at a
    random place, whole, its square apart from all others. Scenes of both parts are
    drawn from digits that the other part does not show; every size has its own draws.

    Args:
        name: Name of the dataset.
        size: Side of the canvas, in pixels.

    Returns:
        `Dataset` of 2,000 training and 300 validation scenes with masks: 0 is the
        background, 1 + d where the digit d is bright.

    Raises:
        ValueError: If `size` is not in 32..256.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(
            f"The side of a scene must be in {SIZES[0]}..{SIZES[1]} pixels, got {size}."
        )
    digits = read_digits()
    digest = hashlib.sha256()
    files = {}
    with tqdm(total=sum(COUNTS.values()), unit=" scenes", desc=name, delay=2) as bar:
        for seed, (part, split) in enumerate(SPLITS.items()):
            random = np.random.default_rng([seed, size])
            pairs = []
            for _ in range(COUNTS[part]):
                image, mask = draw_scene(size, *digits[split], random)
                digest.update(image.tobytes() + mask.tobytes())
                pairs.append([png(image), png(mask)])
                bar.update()
            files[part] = tuple(zip(*pairs, strict=True))

    def stream(part):
        images, masks = files[part]
        return tf.data.Dataset.from_tensor_slices((list(images), list(masks)))

    return Dataset(
        name=name,
        labels=("background", *"0123456789"),
        sizes=dict(COUNTS),
        stream=stream,
        read=lambda handle: handle,
        shuffle_buffer=COUNTS["train"],
        fingerprint=digest.hexdigest(),
        masks=True,
        image_size=(size, size),
        whole=True,
    )


def draw_scene(
    size: int, digits: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        size: S, side of the canvas, in pixels.
        digits: uint8 `(N, 8, 8)`, to choose from.
        labels: What each of them is, `(N,)`.
        random: Where the random numbers come from.

    Returns:
        Image and mask, uint8 `(S, S)`.
    """
    image = random.integers(0, 256, (size, size), "uint8") >> NOISE_SHIFT
    mask = np.zeros((size, size), "uint8")
    area = (size / 64) ** 2
    low, high = (max(1, round(count * area)) for count in DIGITS)
    taken = np.empty((0, 3), int)  # top, left, side
    count = random.integers(low, high + 1)
    for i in random.choice(len(digits), count, replace=False):
        place = _free_place(size, taken, random)
        if place is None:
            continue
        taken = np.vstack([taken, place])
        top, left, side = place
        square = slice(top, top + side), slice(left, left + side)
        digit = enlarge(digits[i], side)
        image[square] = np.maximum(image[square], digit)
        mask[square] = np.where(digit >= THRESHOLD, 1 + labels[i], 0)
    return image, mask


def _free_place(size, taken, random):
    """Top, left and side of a square that meets none that is taken; None if crowded."""
    side = random.integers(SIDES[0], SIDES[1] + 1)
    places = random.integers(0, size - side + 1, (ATTEMPTS, 2))
    starts, sides = taken[:, :2], taken[:, 2:]
    before = places[:, None] + side <= starts  # (attempt, square, axis)
    after = places[:, None] >= starts + sides
    free = np.flatnonzero((before | after).any(-1).all(-1))
    return (*places[free[0]], side) if free.size else None


def enlarge(digit, side):
    """Resize a digit bilinearly: uint8 `(8, 8)` to `(side, side)`."""
    weight = _weights(side)
    return np.round(weight @ digit @ weight.T).astype("uint8")


@functools.cache
def _weights(side):
    """Of the 8 pixels in each of `side`; pixels outside repeat the border."""
    centre = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0, 7)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(8)))  # (side, 8)


def png(pixels):
    """Encode uint8 `(H, W)` as a PNG file."""
    return tf.io.encode_png(pixels[..., None]).numpy()
