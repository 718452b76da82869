"""What a client can ask of an exported model: two signatures, pure TensorFlow.

    image_bytes     encoded files of any size -> probabilities, classes, scores
    images          raw pixels               -> logits, probabilities

`serving_default` is `image_bytes`. Shapes: N images, C classes, k best classes.
"""

import keras
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training.preprocess import decode, resize


class Servable(tf.Module):
    """The variables of a model, once each, and nothing else that could be saved."""

    def __init__(self, model: keras.Model):
        super().__init__()
        self.weights = [variable.value for variable in model.weights]


def signatures(
    model: keras.Model, preprocess: Preprocess, labels: list[str], top_k: int
) -> dict[str, tf.types.experimental.ConcreteFunction]:
    """Trace the signatures of a classifier.

    Args:
        model: Raw images to logits `(N, C)`, on the TensorFlow backend.
        preprocess: How a file becomes an image.
        labels: Name of each class.
        top_k: Number of best classes that `image_bytes` returns, C at most.
    """
    names = tf.constant(labels)
    pixels = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")

    @tf.function(input_signature=[pixels])
    def images(images):
        # The shape is checked here because a tensor of another rank would take the
        # whole server down further inside.
        images = tf.ensure_shape(images, pixels.shape)
        positive = tf.reduce_all(tf.shape(images)[1:] > 0)
        check = tf.debugging.Assert(
            positive,
            ["images must have a positive height and width, got", tf.shape(images)],
        )
        with tf.control_dependencies([check]):
            logits = tf.identity(model(images, training=False), "logits")
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    files = tf.TensorSpec((None,), tf.string, name="image_bytes")

    @tf.function(input_signature=[files])
    def image_bytes(image_bytes):
        image_bytes = tf.ensure_shape(image_bytes, files.shape)
        batch = tf.map_fn(
            lambda data: resize(decode(data), preprocess),
            image_bytes,
            fn_output_signature=tf.TensorSpec((*preprocess.image_size, 3), tf.float32),
        )
        probabilities = tf.nn.softmax(model(batch, training=False))
        scores, best = tf.math.top_k(probabilities, top_k)
        return {
            "probabilities": probabilities,  # (N, C)
            "classes": tf.gather(names, best),  # (N, k)
            "scores": scores,  # (N, k)
        }

    image_bytes = image_bytes.get_concrete_function()
    return {
        "serving_default": image_bytes,
        "image_bytes": image_bytes,
        "images": images.get_concrete_function(),
    }
