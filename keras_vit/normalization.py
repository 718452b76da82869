"""LayerNorm, as Keras has it, in the form that each backend is fastest with."""

import keras
from keras import layers, ops

from keras_vit import kernels

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class LayerNormalization(layers.LayerNormalization):
    """Keras' LayerNorm over the last axis, computed by `kernels.layer_norm`.

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
        x = kernels.layer_norm(x, self.gamma, self.beta, self.epsilon)
        return ops.cast(x, self.compute_dtype)
