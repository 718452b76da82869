"""What an image, or a pixel, of each class weighs in the loss."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.encoder import unknown
from training.data import Dataset
from training.preprocess import decode_mask
from training.task import IGNORED


def weights_of_classes(
    weights: str | Mapping[str, float] | Sequence[float] | None, data: Dataset
) -> np.ndarray | None:
    """The weight of each class, as `Recipe.class_weights` says.

    Args:
        weights: `"balanced"`: n / (C * n_c), of n training images, or pixels, of C
            classes n_c that are of this class, so that their mean is 1; a class without
            any has no part in it. A mapping by name of class, 1 where none is given; or
            a number for each class. None for no weights.
        data: Whose classes they are.

    Returns:
        float32 `(C,)`; None for no weights.

    Raises:
        ValueError: If a name is not of a class, or there are not C numbers.
    """
    if weights is None:
        return None
    if isinstance(weights, Mapping):
        for name in weights:
            if name not in data.labels:
                raise ValueError(unknown("A class of class_weights", name, data.labels))
        return np.array([weights.get(name, 1.0) for name in data.labels], "float32")
    if weights == "balanced":
        counts = count_classes(data)
        present = counts > 0
        each = counts.sum() / (present.sum() * np.maximum(counts, 1))
        return np.where(present, each, 0).astype("float32")
    if len(weights) != len(data.labels):
        raise ValueError(
            f"class_weights must have a number for each of the {len(data.labels)} "
            f"classes of {data.name!r}, got {len(weights)}."
        )
    return np.array(weights, "float32")


def count_classes(data: Dataset) -> np.ndarray:
    """How many training images are of each class; of masks, how many pixels.

    Masks that do not decode count nowhere; images are not looked at.
    """
    classes = len(data.labels)

    def count(labels):
        if data.masks:
            labels = tf.cast(decode_mask(labels), tf.int64)
        return tf.math.bincount(
            tf.cast(tf.reshape(labels, [-1]), tf.int32),
            minlength=IGNORED + 1 if data.masks else classes,
            dtype=tf.int64,
        )

    labels = data.stream("train").map(lambda handle, label: label)
    size = 1 if data.masks else 4096
    if not data.masks:
        labels = labels.batch(size)
    counts = labels.map(count, tf.data.AUTOTUNE).ignore_errors()
    total = -(-data.sizes["train"] // size)
    bar = tqdm(counts.as_numpy_iterator(), "count classes", total, dynamic_ncols=True)
    return sum(bar, np.zeros(1, "int64"))[:classes]


def label_weights(labels: tf.Tensor, weights: np.ndarray, masks: bool) -> tf.Tensor:
    """What each label of a batch weighs.

    Args:
        labels: Classes `(B,)`; probabilities `(B, C)`, which weigh the sum of what
            their classes do by their parts; or masks `(B, H, W)`.
        weights: `(C,)`.
        masks: Whether the labels are masks, where class 255 weighs nothing.

    Returns:
        float32 `(B,)`, or `(B, H, W)`.
    """
    if masks:
        weights = np.pad(weights, (0, IGNORED + 1 - len(weights)))
    elif labels.dtype.is_floating:
        return tf.linalg.matvec(labels, tf.constant(weights))
    return tf.gather(tf.constant(weights), tf.cast(labels, tf.int32))
