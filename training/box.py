"""A part of an image file, decoded without the rest."""

from collections.abc import Callable

import tensorflow as tf

from training.preprocess import orientation, turns, upright

MARGIN = 2  # columns of a JPEG, as far as the colours of a column reach


def decode_box(
    data: tf.Tensor, choose: Callable
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Decode a part of one JPEG, PNG, GIF or BMP: the pixels that `decode` gives there.

    Of a JPEG nothing but the part is decoded, so what is damaged elsewhere may go
    unseen; one that does not end where a JPEG ends, as what is cut off, is decoded as a
    whole, and is an error if it is damaged.

    Args:
        data: Scalar string.
        choose: From the `(height, width)` of the image as it is seen, int32, to offset
            `(top, left)` and size `(height, width)` of the part.

    Returns:
        uint8 `(h, w, 3)`; and, in pixels, offset and size that were chosen, and the
        size of the whole.
    """
    is_whole = tf.strings.substr(data, 0, 3) == b"\xff\xd8\xff"
    is_whole &= tf.strings.substr(data, -2, 2) == b"\xff\xd9"
    decoded, stored = tf.cond(
        is_whole,
        lambda: (tf.zeros((0, 0, 3), tf.uint8), tf.image.extract_jpeg_shape(data)[:2]),
        lambda: _with_size(
            tf.io.decode_image(data, channels=3, expand_animations=False)
        ),
    )
    number = orientation(data)
    swaps, down, left = turns(number)
    whole = tf.where(swaps, stored[::-1], stored)
    offset, size = choose(whole)
    start, sides = tf.cast(offset, tf.int32), tf.cast(size, tf.int32)
    mirrored = tf.stack([down, left])
    start = tf.where(mirrored, whole - start - sides, start)
    start, sides = (tf.where(swaps, x[::-1], x) for x in (start, sides))

    def of_jpeg():
        # Behind the last column of a box its colours are not those of the whole.
        first = tf.maximum(start[1] - MARGIN, 0)
        last = tf.minimum(start[1] + sides[1] + MARGIN, stored[1])
        box = tf.stack([start[0], first, sides[0], last - first])
        wide = tf.image.decode_and_crop_jpeg(data, box, channels=3)
        return wide[:, start[1] - first :][:, : sides[1]]

    def of_decoded():
        (top, left), (height, width) = tf.unstack(start), tf.unstack(sides)
        return decoded[top : top + height, left : left + width]

    image = upright(tf.cond(is_whole, of_jpeg, of_decoded), number)
    return tf.ensure_shape(image, (None, None, 3)), offset, size, whole


def _with_size(image):
    return image, tf.shape(image)[:2]
