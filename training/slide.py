"""A quick warp of images whose rows, or columns, move along themselves alone."""

import numpy as np
import tensorflow as tf


def slid(image: tf.Tensor, axis: int, slope: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Fetch each pixel from a place on its row or column, linear; 0 from outside.

    That is `x + slope y + shift` on a row, `y + slope x + shift` on a column, in unit
    coordinates. Each line is cut out as a box of its own, of an image with a border of
    0: towards that the outermost pixels are interpolated, as those of a warp are.

    Args:
        image: float32 `(H, W, C)`, H and W static.
        axis: 0 for rows, 1 for columns.
        slope: Of a shear along that axis.
        shift: Along that axis.

    Returns:
        `(H, W, C)`.
    """
    other, side = image.shape[axis], image.shape[1 - axis]
    line = np.arange(other, dtype="float32")
    first = side * (slope * ((line + 0.5) / other) + shift) + 1
    start, end = first / (side + 1), (first + side - 1) / (side + 1)
    line = tf.constant(line / max(other - 1, 1))
    boxes = [line, start, line, end] if axis == 0 else [start, line, end, line]
    lines = tf.image.crop_and_resize(
        tf.pad(image, [[axis, axis], [1 - axis, 1 - axis], [0, 0]])[None],
        tf.stack(boxes, axis=1),
        tf.zeros(other, tf.int32),
        (1, side) if axis == 0 else (side, 1),
    )
    lines = tf.reshape(lines, (other, side, -1))
    lines = lines if axis == 0 else tf.transpose(lines, (1, 0, 2))
    return tf.ensure_shape(lines, image.shape)
