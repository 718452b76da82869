"""Augmentation of images, and of masks along with them, from a seed alone."""

import math

import tensorflow as tf


def random_affine(
    images: tf.Tensor,
    seed: tf.Tensor,
    rotation_degrees: float = 0.0,
    zoom: float = 0.0,
    shift: float = 0.0,
    masks: tf.Tensor | None = None,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Rotate, zoom and shift each image by its own random amount.

    Args:
        images: float32 `(B, H, W, C)`.
        seed: int `(2,)`; the same seed gives the same images.
        rotation_degrees: Largest angle to either side.
        zoom: Largest change of the side length, as a fraction of it.
        shift: Largest shift along either axis, as a fraction of the side.
        masks: Class of each pixel, uint8 `(B, H, W)`; None for none.

    Returns:
        `(B, H, W, C)`, bilinear; what comes from outside the image is 0. With masks
        also `(B, H, W)`, nearest; what comes from outside is 255.
    """
    batch = tf.shape(images)[0]
    height, width = images.shape[1:3]
    draw = tf.random.stateless_uniform((4, batch), seed, -1.0, 1.0)
    angle = draw[0] * (rotation_degrees * math.pi / 180)
    scale = 1.0 + draw[1] * zoom
    cosine, sine = tf.cos(angle) * scale, tf.sin(angle) * scale
    # The op maps each output pixel (x, y) to (a0 x + a1 y + a2, b0 x + b1 y + b2).
    x, y = (width - 1) / 2, (height - 1) / 2
    right = x - cosine * x + sine * y + draw[2] * shift * width
    down = y - sine * x - cosine * y + draw[3] * shift * height
    zero = tf.zeros_like(angle)
    rows = [cosine, -sine, right, sine, cosine, down, zero, zero]
    transforms = tf.stack(rows, axis=-1)

    def transformed(x, interpolation, outside):
        return tf.raw_ops.ImageProjectiveTransformV3(
            images=x,
            transforms=transforms,
            output_shape=[height, width],
            fill_value=outside,
            interpolation=interpolation,
            fill_mode="CONSTANT",
        )

    images = transformed(images, "BILINEAR", 0.0)
    if masks is None:
        return images
    return images, transformed(masks[..., None], "NEAREST", 255.0)[..., 0]
