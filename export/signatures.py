"""What a client can ask of an exported model, pure TensorFlow.

A classifier:
    image_bytes     encoded files of any size -> probabilities, classes, scores
    images          raw pixels                -> logits, probabilities
A model of a class for every pixel:
    image_bytes     encoded files of any size -> label_map_bytes, PNGs of their size
    images          raw pixels                -> label_map
    logits          raw pixels                -> logits

`serving_default` is `image_bytes`. Shapes: N images, H x W pixels, C classes, k best
classes.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training.preprocess import decode, resize

Functions = dict[str, tf.types.experimental.ConcreteFunction]


class Servable(tf.Module):
    """The variables of a model, once each, and nothing else that could be saved."""

    def __init__(self, model: keras.Model):
        super().__init__()
        self.weights = [variable.value for variable in model.weights]


def signatures(
    model: keras.Model, preprocess: Preprocess, labels: list[str], top_k: int
) -> Functions:
    """Trace the signatures of a model.

    Args:
        model: Raw images to logits `(N, C)`, or `(N, H, W, C)`, on the TensorFlow
            backend.
        preprocess: How a file becomes an image.
        labels: Name of each class.
        top_k: Number of best classes that `image_bytes` returns, C at most.
    """
    if len(model.output_shape) == 4:
        return _of_segmenter(model, preprocess)
    return _of_classifier(model, preprocess, labels, top_k)


def _of_classifier(model, preprocess, labels, top_k):
    names = tf.constant(labels)

    def images(images):
        logits = _logits(model, images)
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    def image_bytes(image_bytes):
        batch = tf.map_fn(
            lambda data: resize(decode(data), preprocess),
            image_bytes,
            fn_output_signature=tf.TensorSpec((*preprocess.image_size, 3), tf.float32),
        )
        probabilities = tf.nn.softmax(_logits(model, batch))
        scores, best = tf.math.top_k(probabilities, top_k)
        return {
            "probabilities": probabilities,  # (N, C)
            "classes": tf.gather(names, best),  # (N, k)
            "scores": scores,  # (N, k)
        }

    return _trace(model, image_bytes, images=images)


def _of_segmenter(model, preprocess):
    """Each file is answered by itself: their sizes may differ."""
    dtype = tf.uint8 if model.output_shape[-1] <= 256 else tf.uint16

    def images(images):
        return {"label_map": _label_map(_logits(model, images))}

    def logits(images):
        return {"logits": _logits(model, images)}

    def label_map_bytes(data):
        image = tf.cast(decode(data), tf.float32)
        size = tf.shape(image)[:2]
        if None not in model.input_shape[1:3]:
            whole = tf.image.resize(
                image, preprocess.image_size, preprocess.interpolation, antialias=True
            )
            image = tf.clip_by_value(whole, 0.0, 255.0)
        logits = tf.image.resize(_logits(model, image[None]), size)
        return tf.io.encode_png(tf.cast(_label_map(logits)[0, ..., None], dtype))

    def image_bytes(image_bytes):
        spec = tf.TensorSpec((), tf.string)
        maps = tf.map_fn(label_map_bytes, image_bytes, fn_output_signature=spec)
        return {"label_map_bytes": maps}

    return _trace(model, image_bytes, images=images, logits=logits)


def _label_map(logits):
    return tf.argmax(logits, axis=-1, output_type=tf.int32)  # (N, H, W)


def _logits(model, images):
    """Logits of a batch that may be empty, which some kernels cannot take."""
    number = tf.shape(images)[0]
    missing = tf.maximum(1 - number, 0)
    images = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
    images = tf.ensure_shape(images, (None, *model.input_shape[1:]))
    return model(images, training=False)[:number]


def _trace(model, of_files: Callable, **of_pixels: Callable) -> Functions:
    """Check what comes in, since a wrong shape could take the whole server down."""
    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")
    files = tf.TensorSpec((None,), tf.string, name="image_bytes")

    def checked(function):
        def images(images):
            images = tf.ensure_shape(images, pixels.shape)
            check = tf.debugging.Assert(
                tf.reduce_all(tf.shape(images)[1:] > 0),
                ["images must have a positive height and width, got", tf.shape(images)],
            )
            with tf.control_dependencies([check]):
                return function(tf.identity(images))

        return tf.function(images, input_signature=[pixels]).get_concrete_function()

    def image_bytes(image_bytes):
        return of_files(tf.ensure_shape(image_bytes, files.shape))

    answer = tf.function(image_bytes, input_signature=[files]).get_concrete_function()
    return {
        "serving_default": answer,
        "image_bytes": answer,
        **{name: checked(function) for name, function in of_pixels.items()},
    }
