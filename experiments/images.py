"""The images of the experiments: real pictures, enlarged, placed, or composed.

The pictures are the 1,797 digits of scikit-learn, 8 x 8 pixels (`training.digits`):
real, small, and there without a download. What an experiment shows is made of them.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

import training
from training.digits import read_digits

SIDE = 32  # of pictures of other data, pixels
CHUNK = 512  # images that are resized at once


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Small pictures with classes.

    Args:
        train: uint8 `(N, s, s)` or `(N, s, s, 3)`, and their classes `(N,)`.
        test: The same, held out.
        labels: Name of each class.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    labels: tuple[str, ...]

    def few(self, count: int, seed: int) -> "Pictures":
        """Leave `count` training pictures, drawn at random; all if there are fewer.

        Of two counts with one seed the smaller has pictures of the larger alone.
        """
        return dataclasses.replace(self, train=_drawn(self.train, count, seed))


def read_pictures(setting) -> Pictures:
    """The pictures of a setting.

    While a learning rate is chosen every sixth training picture is the test's, and the
    test's own are not looked at. `--quick` leaves a few.
    """
    splits, labels = _read(setting.data)
    train, test = splits["train"], splits["test"]
    if setting.choosing:
        held_out = np.arange(len(train[1])) % 6 == 0
        train, test = ([x[rows] for x in train] for rows in (~held_out, held_out))
    if setting.quick:
        train, test = _drawn(train, 128), _drawn(test, 64)
    return Pictures(tuple(train), tuple(test), labels)


def available(setting, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Those numbers of training pictures that there are; all in place of more."""
    if setting.data == "digits":
        return counts
    total = len(read_pictures(setting).train[1])
    return tuple(dict.fromkeys(min(count, total) for count in counts))


def _drawn(part, count, seed=0):
    chosen = np.random.default_rng(seed).permutation(len(part[1]))[:count]
    return part[0][chosen], part[1][chosen]


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
    """Resize bilinearly, antialiased: uint8 `(N, h, w)` or with colours to `side`."""
    colours = images if images.ndim == 4 else images[..., None]
    found = np.empty((len(images), side, side, colours.shape[-1]), "uint8")
    for start in range(0, len(images), CHUNK):
        rows = slice(start, start + CHUNK)
        resized = tf.image.resize(colours[rows], (side, side), antialias=True)
        found[rows] = resized.numpy().round().clip(0, 255)
    return found if images.ndim == 4 else found[..., 0]


def place(
    images: np.ndarray,
    canvas: int,
    sides: tuple[int, int],
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Each picture in a random size at a random place, whole, on a black canvas.

    Args:
        images: uint8 `(N, s, s)` or `(N, s, s, 3)`.
        canvas: S, side of a canvas, pixels.
        sides: Smallest and largest side of a picture on it, pixels.
        random: Where random numbers come from.

    Returns:
        Canvases uint8 `(N, S, S)` or `(N, S, S, 3)`, and where the pictures are: top,
        left and side, int `(N, 3)`.
    """
    squares = draw_squares(len(images), canvas, sides, random)
    return paste(images, canvas, squares), squares


def draw_squares(
    count: int, canvas: int, sides: tuple[int, int], random: np.random.Generator
) -> np.ndarray:
    """Top, left and side of squares that lie whole on a canvas: int `(N, 3)`."""
    side = random.integers(sides[0], sides[1] + 1, count)
    corner = random.integers(0, canvas - side[:, None] + 1, (count, 2))
    return np.column_stack([corner, side])


def paste(images: np.ndarray, canvas: int, squares: np.ndarray) -> np.ndarray:
    """Each picture in its square of a black canvas: uint8 `(N, S, S)`, or coloured."""
    found = np.zeros((len(images), canvas, canvas, *images.shape[3:]), "uint8")
    for size in np.unique(squares[:, 2]):
        own = np.flatnonzero(squares[:, 2] == size)
        for i, picture in zip(own, enlarge(images[own], size), strict=True):
            top, left = squares[i, :2]
            found[i, top : top + size, left : left + size] = picture
    return found


def on_black(images: np.ndarray, canvas: int, top: int, left: int) -> np.ndarray:
    """Each picture at one place of a black canvas; what is outside is cut off."""
    side = images.shape[1]
    found = np.zeros((len(images), canvas, canvas, *images.shape[3:]), "uint8")
    rows = slice(max(top, 0), min(top + side, canvas))
    columns = slice(max(left, 0), min(left + side, canvas))
    found[:, rows, columns] = images[
        :,
        rows.start - top : rows.stop - top,
        columns.start - left : columns.stop - left,
    ]
    return found


@functools.cache
def _read(name):
    """Pictures of both parts, and the names of the classes.

    Of other data than the digits they are the middle square, of `SIDE` pixels.
    """
    if name == "digits":
        return read_digits(), tuple("0123456789")
    data = training.load_data(name)
    if data.masks:
        raise ValueError(f"The pictures must have one class each, got {name!r}.")
    splits = {}
    for part, split in (("train", "train"), ("validation", "test")):
        images, classes = [], []
        stream = data.stream(part).map(
            lambda handle, label: (_square(data.decode(handle, label)[0]), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        total = data.sizes[part]
        for image, label in tqdm(stream.as_numpy_iterator(), part, total):
            images.append(image)
            classes.append(label)
        splits[split] = np.stack(images), np.array(classes)
    return splits, data.labels


def _square(image):
    side = tf.reduce_min(tf.shape(image)[:2])
    image = tf.image.resize_with_crop_or_pad(image, side, side)
    image = tf.image.resize(image, (SIDE, SIDE), antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
