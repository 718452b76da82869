"""From an image file to the raw pixels that a model takes, in TensorFlow.

Training, evaluation and serving all come through here, so they see the same pixels.
The mean and the deviation are not applied: they stand in the model, which also carries
the record of the rest (`keras_vit.embedding.Preprocess`).

Where a pixel came from is told by a matrix, float32 `(3, 3)`: it takes a point of the
result `(x, y, 1)` to its place in the file. Both are in unit coordinates: x runs from 0
at the left edge of the picture to 1 at the right, y from 0 at the top to 1 at the
bottom.
"""

import tensorflow as tf

from keras_vit.embedding import Preprocess


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decode one JPEG, PNG, GIF or BMP to RGB: scalar string to uint8 `(h, w, 3)`."""
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def decode_mask(data: tf.Tensor) -> tf.Tensor:
    """Decode one PNG of class numbers: scalar string to uint8 `(h, w, 1)`."""
    mask = tf.io.decode_png(data)
    return tf.ensure_shape(mask, (None, None, 1))


def resize(image: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Resize and crop one image `(h, w, 3)` to float32 `(H, W, 3)` of 0..255."""

    def scale(image, size):
        return scaled(image, size, preprocess.interpolation)

    return _fit(image, preprocess, scale)


def resize_mask(mask: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Give a mask `(h, w, 1)` the geometry of its image: uint8 `(H, W)`, nearest."""

    def scale(mask, size):
        return tf.image.resize(mask, size, "nearest")

    return _fit(mask, preprocess, scale)[..., 0]


def geometry(shape: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """The matrix of what `resize` does to an image of `shape` (h, w): `(3, 3)`.

    The identity without a `crop_ratio`, else that of the central crop.
    """
    if preprocess.crop_ratio is None:
        return tf.eye(3)
    size, offset = _cover(shape, preprocess)
    return crop_matrix(offset, preprocess.image_size, size)


def crop_matrix(offset: tf.Tensor, size: tf.Tensor, whole: tf.Tensor) -> tf.Tensor:
    """The matrix of a crop, from its unit coordinates to those of the whole: `(3, 3)`.

    Args:
        offset: `(top, left)` of the crop, in pixels.
        size: `(height, width)` of the crop, in pixels.
        whole: `(height, width)` of the image that it is cut from, in pixels.
    """
    whole = tf.cast(whole, tf.float32)
    top, left = tf.unstack(tf.cast(offset, tf.float32) / whole)
    height, width = tf.unstack(tf.cast(size, tf.float32) / whole)
    return tf.stack([[width, 0.0, left], [0.0, height, top], [0.0, 0.0, 1.0]])


def scaled(image: tf.Tensor, size: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Resize one image to `size` (H, W), antialiased: float32 of 0..255."""
    image = tf.cast(image, tf.float32)
    image = tf.image.resize(image, size, interpolation, antialias=True)
    return tf.clip_by_value(image, 0.0, 255.0)  # bicubic overshoots


def _fit(image, preprocess, scale):
    """Bring an image to the size of `preprocess` by `scale(image, size)` and a crop."""
    height, width = preprocess.image_size
    if preprocess.crop_ratio is None:
        return scale(image, (height, width))
    size, offset = _cover(tf.shape(image)[:2], preprocess)
    image = scale(image, size)
    top, left = tf.unstack(offset)
    image = image[top : top + height, left : left + width]
    return tf.ensure_shape(image, (height, width, image.shape[-1]))


def _cover(shape, preprocess):
    """Size to which an image of `shape` is resized, and offset of the central crop.

    Both int32 `(2,)`, height first: those of torchvision's Resize and CenterCrop.
    """
    height, width = preprocess.image_size
    floor = [int(side / preprocess.crop_ratio) for side in (height, width)]
    shape = tf.cast(shape, tf.float64)
    ratio = tf.reduce_max(tf.constant(floor, tf.float64) / shape)
    size = tf.maximum(tf.cast(shape * ratio, tf.int32), floor)
    offset = tf.round(tf.cast(size - [height, width], tf.float32) / 2)
    return size, tf.cast(offset, tf.int32)
