"""Multi-head self-attention.

Shapes in this file:
    B batch, N tokens, D embedding, H heads, d = D / H.
"""

import keras
from keras import layers, ops

from keras_vit import kernels
from keras_vit.initialization import initializer

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class SelfAttention(layers.Layer):
    """Multi-head self-attention with one fused projection to queries, keys, values.

        [q, k, v] = z U_qkv                                 (5)
        SA(z)     = softmax(q k^T / sqrt(d)) v              (6, 7)
        MSA(z)    = [SA_1(z); ...; SA_H(z)] U_msa           (8)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", appendix A,
    https://arxiv.org/abs/2010.11929; the normalisation of queries and keys is that of
    Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters",
    https://arxiv.org/abs/2302.05442.

    Args:
        num_heads: H; must divide D.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether each head's queries and keys pass a LayerNorm over d.
        dropout: Rate in [0, 1) on the output.
        attention_dropout: Rate in [0, 1) on the attention weights.
        epsilon: Added to the variance, where `qk_norm` is on.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, N, D)`.

    Returns:
        `(B, N, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D.
    """

    def __init__(
        self,
        num_heads,
        qkv_bias=True,
        qk_norm=False,
        dropout=0.0,
        attention_dropout=0.0,
        epsilon=1e-6,
        initialization="jax",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.epsilon = epsilon
        self.initialization = initialization
        # With a noise shape, PyTorch too draws from the layer's own seed generator.
        self.dropout = layers.Dropout(
            dropout, noise_shape=(None, None, None), dtype=self.dtype_policy
        )
        self.attention_dropout = layers.Dropout(
            attention_dropout, noise_shape=(None,) * 4, dtype="float32"
        )

    def build(self, tokens_shape):
        dim = tokens_shape[-1]
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide D, got D={dim}.")
        self.qkv = self._dense(3 * dim, self.qkv_bias, "qkv")
        self.project = self._dense(dim, True, "project")
        self.qkv.build((None, dim))
        self.project.build((None, dim))
        if self.qk_norm:
            head_shape = (None, self.num_heads, None, dim // self.num_heads)
            self.query_norm = self._norm("query_norm")
            self.key_norm = self._norm("key_norm")
            self.query_norm.build(head_shape)
            self.key_norm.build(head_shape)

    def _dense(self, units, use_bias, name):
        return layers.Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer(self.initialization, "attention_kernel"),
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name):
        return layers.LayerNormalization(
            epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def call(self, tokens, training=None):
        batch, length = ops.shape(tokens)[:2]
        dim = tokens.shape[-1]
        head_dim = dim // self.num_heads
        qkv = kernels.dense(self.qkv, tokens)  # (B, N, 3 D)
        qkv = ops.reshape(qkv, (batch, length, 3, self.num_heads, head_dim))
        qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))  # (3, B, H, N, d)
        query, key, value = qkv[0], qkv[1], qkv[2]
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        x = kernels.attention(query, key, value, self._dropout_of_weights(training))
        x = ops.transpose(x, (0, 2, 1, 3))  # (B, N, H, d)
        x = ops.reshape(x, (batch, length, dim))
        return self.dropout(kernels.dense(self.project, x), training=training)

    def _dropout_of_weights(self, training):
        if not training or not self.attention_dropout.rate:
            return None
        return lambda weights: self.attention_dropout(weights, training=True)
