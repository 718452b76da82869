"""From tokens to one vector an image (pooling), and from that to logits (head).

Shapes in this file:
    B batch, N patch tokens, R prefix tokens, D embedding, H heads, d = D / H,
    C classes.
"""

from collections.abc import Iterable

import keras
from keras import layers, ops

from keras_vit import kernels
from keras_vit.initialization import initializer
from keras_vit.normalization import LayerNormalization
from keras_vit.transformer import MLP

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class TokenPool(layers.Layer):
    """Take one token: the class token, or the distillation token.

    Source: Dosovitskiy et al. 2021, eq. 4, https://arxiv.org/abs/2010.11929.

    Args:
        index: Which token.

    Call arguments:
        tokens: `(B, R + N, D)`.

    Returns:
        `(B, D)`.
    """

    def __init__(self, index=0, **kwargs):
        super().__init__(**kwargs)
        self.index = index

    def compute_output_shape(self, tokens_shape):
        return (tokens_shape[0], tokens_shape[-1])

    def call(self, tokens):
        return tokens[:, self.index]


@serializable
class MeanPool(layers.Layer):
    """Mean over the patch tokens; prefix tokens do not count.

    Args:
        num_prefix: R, number of tokens before the patches.

    Call arguments:
        tokens: `(B, R + N, D)`.

    Returns:
        `(B, D)`.
    """

    def __init__(self, num_prefix=0, **kwargs):
        super().__init__(**kwargs)
        self.num_prefix = num_prefix

    def compute_output_shape(self, tokens_shape):
        return (tokens_shape[0], tokens_shape[-1])

    def call(self, tokens):
        x = ops.cast(tokens[:, self.num_prefix :], "float32")
        return ops.cast(ops.mean(x, axis=1), self.compute_dtype)


@serializable
class Classifier(layers.Dense):
    """A `keras.layers.Dense` of logits that knows what its classes are called.

    Args:
        units: C.
        labels: Name of each class, in the order of the logits; None where nobody knows
            them. They are saved with the layer and change nothing that it computes.
        **kwargs: Other arguments of `keras.layers.Dense`.

    Call arguments:
        x: `(..., D)`.

    Returns:
        `(..., C)`.

    Raises:
        ValueError: If `labels` are not C strings.
    """

    def __init__(self, units, *, labels=None, **kwargs):
        super().__init__(units, **kwargs)
        if labels is not None:
            labels = _checked_labels(labels, units)
        self.labels = labels

    def get_config(self):
        labels = None if self.labels is None else list(self.labels)
        return {**super().get_config(), "labels": labels}


def _checked_labels(labels, units):
    listed = isinstance(labels, Iterable) and not isinstance(labels, str)
    names = tuple(labels) if listed else (None,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"labels must be a list of strings, got {labels!r:.80}.")
    if len(names) != units:
        raise ValueError(
            f"labels must name each of the {units} classes, got {len(names)}."
        )
    return names


def class_labels(model):
    """Names of a model's classes, as its layer `head` carries them.

    Returns:
        Tuple of strings, in the order of the logits; None where it carries none.
    """
    heads = [layer for layer in model.layers if layer.name == "head"]
    known = heads and isinstance(heads[0], Classifier)
    return heads[0].labels if known else None


@serializable
class TokenMax(layers.Layer):
    """Add what the most certain token says of each class to what the image says.

        logits = class_logits + weight * max over tokens of token_logits

    Source: inference of the paper's code, https://github.com/zihangJiang/TokenLabeling,
    of Jiang et al. 2021, "All Tokens Matter", https://arxiv.org/abs/2104.10858.

    Args:
        weight: Weight of the tokens.

    Call arguments:
        class_logits: `(B, C)`.
        token_logits: `(B, h, w, C)`.

    Returns:
        `(B, C)`.
    """

    def __init__(self, weight=0.5, **kwargs):
        super().__init__(**kwargs)
        self.weight = weight

    def build(self, class_logits_shape, token_logits_shape):
        pass

    def compute_output_shape(self, class_logits_shape, token_logits_shape):
        return class_logits_shape

    def call(self, class_logits, token_logits):
        return class_logits + self.weight * ops.max(token_logits, axis=(1, 2))


@serializable
class AttentionPool(layers.Layer):
    """Multi-head attention pooling: a learned probe asks all patch tokens.

        y = MHA(probe, tokens),  y + MLP(LN(y))

    Source: Zhai et al. 2022, "Scaling Vision Transformers", section 3.2,
    https://arxiv.org/abs/2106.04560 (`MAPHead` of big_vision).

    Args:
        num_heads: H; must divide D.
        num_prefix: R, number of tokens before the patches; they are not asked.
        mlp_ratio: Hidden width of the MLP, as a multiple of D.
        gelu: `"exact"`, `"tanh"` or `"quick"`.
        epsilon: Added to the variance by the LayerNorm.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, R + N, D)`.

    Returns:
        `(B, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D.
    """

    def __init__(
        self,
        num_heads,
        num_prefix=0,
        mlp_ratio=4.0,
        gelu="exact",
        epsilon=1e-6,
        initialization="jax",
        **kwargs,
    ):
        super().__init__(**kwargs)
        policy = self.dtype_policy
        self.num_heads = num_heads
        self.num_prefix = num_prefix
        self.initialization = initialization
        self.norm = LayerNormalization(epsilon=epsilon, dtype=policy, name="norm")
        self.mlp = MLP(mlp_ratio, gelu, 0.0, initialization, dtype=policy, name="mlp")

    def build(self, tokens_shape):
        dim = tokens_shape[-1]
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide D, got D={dim}.")
        self.scale = (dim // self.num_heads) ** -0.5
        self.probe = self.add_weight(
            shape=(1, 1, dim),
            initializer=initializer(self.initialization, "probe", dim),
            name="probe",
        )
        self.query = self._dense(dim, "query")
        self.key_value = self._dense(2 * dim, "key_value")
        self.project = self._dense(dim, "project")
        for layer in (self.query, self.key_value, self.project):
            layer.build((None, dim))
        self.norm.build((None, 1, dim))
        self.mlp.build((None, 1, dim))

    def _dense(self, units, name):
        return layers.Dense(
            units,
            kernel_initializer=initializer(self.initialization, "attention_kernel"),
            dtype=self.dtype_policy,
            name=name,
        )

    def compute_output_shape(self, tokens_shape):
        return (tokens_shape[0], tokens_shape[-1])

    def call(self, tokens):
        tokens = tokens[:, self.num_prefix :]
        batch, length, dim = ops.shape(tokens)
        head_dim = dim // self.num_heads
        query = kernels.dense(self.query, ops.cast(self.probe, tokens.dtype))
        query = ops.reshape(query, (1, self.num_heads, 1, head_dim))
        query = ops.broadcast_to(query, (batch, self.num_heads, 1, head_dim))
        x = kernels.dense(self.key_value, tokens)  # (B, N, 2 D)
        x = ops.reshape(x, (batch, length, 2, self.num_heads, head_dim))
        x = ops.transpose(x, (2, 0, 3, 1, 4))  # (2, B, H, N, d)
        x = kernels.attention(query, *ops.unstack(x, 2), self.scale)  # (B, H, 1, d)
        x = kernels.dense(self.project, ops.reshape(x, (batch, 1, dim)))
        x = x + self.mlp(self.norm(x))
        return x[:, 0]
