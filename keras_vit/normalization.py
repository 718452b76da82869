"""LayerNorm as Keras has it, but for the graph of a server."""

import keras
from keras import layers, ops

from keras_vit import kernels

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class LayerNormalization(layers.LayerNormalization):
    """Keras' LayerNorm, which a TensorFlow server computes as one kernel.

        (x - mean) / sqrt(variance + epsilon) * gamma + beta

    Source: Ba et al. 2016, "Layer Normalization", https://arxiv.org/abs/1607.06450.

    Args:
        epsilon: Added to the variance.

    Call arguments:
        x: `(B, ..., D)`.

    Returns:
        `(B, ..., D)`; mean and variance are float32 under every policy.
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)

    def call(self, x):
        plain = self.scale and self.center and not self.rms_scaling
        last = list(self.axis) in ([-1], [len(x.shape) - 1])
        if not (kernels.is_serving() and plain and last) or x.dtype == "float16":
            return super().call(x)
        x = kernels.fused_layer_norm(x, self.gamma, self.beta, self.epsilon)
        return ops.cast(x, self.compute_dtype)
