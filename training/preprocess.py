"""From an image file to the raw pixels that a model takes, in TensorFlow.

Training, evaluation and serving all come through here, so they see the same pixels.
The mean and the deviation are not applied: they stand in the model, which also carries
the record of the rest (`keras_vit.embedding.Preprocess`).
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
        image = tf.cast(image, tf.float32)
        image = tf.image.resize(image, size, preprocess.interpolation, antialias=True)
        return tf.clip_by_value(image, 0.0, 255.0)  # bicubic overshoots

    return _fit(image, preprocess, scale)


def resize_mask(mask: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Give a mask `(h, w, 1)` the geometry of its image: uint8 `(H, W)`, nearest."""

    def scale(mask, size):
        return tf.image.resize(mask, size, "nearest")

    return _fit(mask, preprocess, scale)[..., 0]


def _fit(image, preprocess, scale):
    """Bring an image to the size of `preprocess` by `scale(image, size)` and a crop."""
    height, width = preprocess.image_size
    if preprocess.crop_ratio is None:
        return scale(image, (height, width))
    # The sizes of torchvision's Resize and CenterCrop.
    floor = [int(side / preprocess.crop_ratio) for side in (height, width)]
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    ratio = tf.reduce_max(tf.constant(floor, tf.float64) / shape)
    size = tf.maximum(tf.cast(shape * ratio, tf.int32), floor)
    image = scale(image, size)
    offset = tf.round(tf.cast(size - [height, width], tf.float32) / 2)
    top, left = tf.unstack(tf.cast(offset, tf.int32))
    image = image[top : top + height, left : left + width]
    return tf.ensure_shape(image, (height, width, image.shape[-1]))
