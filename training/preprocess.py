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


def resize(image: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Resize and crop one image `(h, w, 3)` to float32 `(H, W, 3)` of 0..255."""
    height, width = preprocess.image_size
    image = tf.cast(image, tf.float32)
    if preprocess.crop_ratio is None:
        return _resize(image, (height, width), preprocess.interpolation)
    # The sizes of torchvision's Resize and CenterCrop.
    floor = [int(side / preprocess.crop_ratio) for side in (height, width)]
    shape = tf.cast(tf.shape(image)[:2], tf.float64)
    scale = tf.reduce_max(tf.constant(floor, tf.float64) / shape)
    size = tf.maximum(tf.cast(shape * scale, tf.int32), floor)
    image = _resize(image, size, preprocess.interpolation)
    offset = tf.round(tf.cast(size - [height, width], tf.float32) / 2)
    top, left = tf.unstack(tf.cast(offset, tf.int32))
    image = image[top : top + height, left : left + width]
    return tf.ensure_shape(image, (height, width, 3))


def _resize(image, size, interpolation):
    image = tf.image.resize(image, size, interpolation, antialias=True)
    return tf.clip_by_value(image, 0.0, 255.0)  # bicubic overshoots
