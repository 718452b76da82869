"""Datasets from arrays of images."""

import hashlib
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from training.data import Dataset, fingerprint

KEYS = ("x_train", "y_train", "x_test", "y_test")  # as in Keras' mnist.npz
Pair = tuple[np.ndarray, np.ndarray]


def from_arrays(
    train: Pair,
    validation: Pair | float = 0.1,
    labels: Sequence[str] | None = None,
    name: str = "arrays",
) -> Dataset:
    """A dataset of images that are in memory, or in a memory map; none is copied.

    Args:
        train: Images, uint8 `(N, H, W)`, `(N, H, W, 1)` or `(N, H, W, 3)` of 0..255,
            and their classes, integers `(N,)`.
        validation: The same, held out; or which share of the training images of each
            class is held out, evenly spaced: 0.1 for every tenth.
        labels: Name of each class; None for their numbers.
        name: Name of the dataset.

    Raises:
        ValueError: If images or classes are of another type, shape or number, there
            are less than two classes, or none is left for a part.
    """
    parts = {"train": _checked("train", *train)}
    rows = {}
    if isinstance(validation, int | float):
        rows = _split(name, parts["train"][1], validation)
        parts["validation"] = parts["train"]
    else:
        parts["validation"] = _checked("validation", *validation)
        rows = {part: np.arange(len(y)) for part, (_, y) in parts.items()}
    sizes = {part: len(numbers) for part, numbers in rows.items()}
    if not all(sizes.values()):
        raise ValueError(f"{name!r} must have images in both parts, got {sizes}.")
    shapes = {part: x.shape[1:] for part, (x, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"Both parts must have images of one shape, got {shapes}.")
    highest = max(int(y.max()) for _, y in parts.values())
    labels = tuple(map(str, range(highest + 1) if labels is None else labels))
    if not 1 < len(labels) or highest >= len(labels):
        raise ValueError(
            f"labels must name each class, at least 2 and up to {highest}, the highest "
            f"of {name!r}; got {len(labels)}."
        )

    def stream(part):
        own = rows[part]
        handles = tf.data.Dataset.from_tensor_slices((own, parts[part][1][own]))
        return handles.map(lambda i, label: (part + "/" + tf.as_string(i), label))

    def find(handle):
        part, _, number = handle.decode().partition("/")
        return _bitmap(parts[part][0][int(number)])

    def read(handle):
        image = tf.numpy_function(find, [handle], tf.string, stateful=False)
        return tf.ensure_shape(image, ())

    arrays = [x for pair in parts.values() for x in pair]
    content = [_checksum(x) for x in arrays]
    content += [_checksum(x) for x in rows.values()]
    return Dataset(
        name=name,
        labels=labels,
        sizes=sizes,
        stream=stream,
        read=read,
        shuffle_buffer=sizes["train"],
        fingerprint=fingerprint([content, labels]),
        image_size=shapes["train"][:2],
        whole=True,
    )


def load_arrays(name: str, path: Path) -> Dataset:
    """The arrays of an npz file: `x_train`, `y_train`, and `x_test`, `y_test`.

    Without the latter every tenth image of each class is held out.

    Raises:
        ValueError: If it is no such file, or the arrays are none of images.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in KEYS if key in file.files}
            found = file.files
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} must be a whole npz file ({error}).") from error
    if tuple(arrays) not in (KEYS, KEYS[:2]):
        raise ValueError(
            f"{path} must hold {' and '.join(KEYS[:2])}, and both or none of "
            f"{' and '.join(KEYS[2:])}, got {', '.join(found) or 'none'}."
        )
    train, *held_out = zip(*[iter(arrays.values())] * 2, strict=True)
    return from_arrays(train, *held_out, name=name)


def _checked(part, images, classes):
    """The pair as arrays, classes int64 `(N,)`."""
    images, classes = np.asanyarray(images), np.asarray(classes)
    fits = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits:
        raise ValueError(
            f"The images of {part} must be uint8 of 0..255 and (N, H, W), (N, H, W, 1) "
            f"or (N, H, W, 3), got {images.dtype} {images.shape}."
        )
    if classes.ndim == 2 and classes.shape[1] == 1:
        classes = classes[:, 0]  # as CIFAR's are
    if (
        not np.issubdtype(classes.dtype, np.integer)
        or classes.shape != images.shape[:1]
    ):
        raise ValueError(
            f"The classes of {part} must be integers ({len(images)},), one an image, "
            f"got {classes.dtype} {classes.shape}."
        )
    if not len(images):
        raise ValueError(f"The arrays of {part} must have images, got none.")
    if classes.min() < 0:
        raise ValueError(f"The classes of {part} must be >= 0, got {classes.min()}.")
    return images, classes.astype("int64")


def _split(name, classes, share):
    """Numbers of the images of both parts; the share of each class is held out."""
    if isinstance(share, bool) or not 0 < share < 1:
        raise ValueError(
            f"validation must be a pair of arrays, or a share in (0, 1), got {share}."
        )
    held_out = np.zeros(len(classes), bool)
    for label in np.unique(classes):
        own = np.flatnonzero(classes == label)
        due = np.floor(np.arange(len(own) + 1) * share + 1e-9)
        held_out[own[np.diff(due) > 0]] = True
    if not held_out.any():
        raise ValueError(
            f"{name!r} must have at least {math.ceil(1 / share)} images of some class, "
            f"so that {share:g} of them can be held out."
        )
    return {
        "train": np.flatnonzero(~held_out),
        "validation": np.flatnonzero(held_out),
    }


def _bitmap(image):
    """A BMP file of 24 bits a pixel: what is quickest to write, pixel by pixel."""
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.broadcast_to(
            image.reshape(*image.shape[:2], 1), (*image.shape[:2], 3)
        )
    height, width = image.shape[:2]
    rows = np.zeros((height, -(-width * 3 // 4) * 4), "uint8")  # of whole words
    rows[:, : width * 3] = image[::-1, :, ::-1].reshape(height, -1)  # upwards, BGR
    fields = np.array([54 + rows.size, 0, 54, 40, width, height], "<u4").tobytes()
    depth = np.array([1, 24], "<u2").tobytes()
    rest = np.array([0, rows.size, 0, 0, 0, 0], "<u4").tobytes()
    return b"BM" + fields + depth + rest + rows.tobytes()


def _checksum(array):
    array = np.ascontiguousarray(array)
    return [str(array.dtype), array.shape, hashlib.sha256(array).hexdigest()]
