"""Multi-head self-attention, plain and with reduced keys and values.

Shapes in this file:
    B batch, h x w patch grid, N tokens, D embedding, H heads, d = D / H, r reduction.
"""

import keras
from keras import layers, ops

from keras_vit import kernels
from keras_vit.embedding import PatchEmbedding
from keras_vit.initialization import initializer
from keras_vit.normalization import LayerNormalization
from keras_vit.relative import RelativePositionBias, RotaryPosition

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
        position: `"relative"` (`RelativePositionBias`), `"rotary"` (`RotaryPosition`)
            or None: the tokens know where they are, or need not.

    Call arguments:
        tokens: `(B, N, D)`.
        grid: `(B, h, w, _)`; only its shape is used, and only if there is a `position`.

    Returns:
        `(B, N, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D, `position` is unknown, or a
            rotary one meets heads whose width is not a multiple of 4.
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
        position=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if position not in (None, "relative", "rotary"):
            raise ValueError(
                f"position must be 'relative', 'rotary' or None, got {position!r}."
            )
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
        self.bias = self.rotary = None
        if position == "relative":
            self.bias = RelativePositionBias(
                num_heads,
                initialization=initialization,
                dtype=self.dtype_policy,
                name="bias",
            )
        elif position == "rotary":
            self.rotary = RotaryPosition(dtype=self.dtype_policy, name="rotary")

    def build(self, tokens_shape, grid_shape=None):
        dim = tokens_shape[-1]
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide D, got D={dim}.")
        self.scale = (dim // self.num_heads) ** -0.5
        if self.bias is not None:
            self.bias.build(tokens_shape, grid_shape)
        if self.rotary is not None:
            head_shape = (None, self.num_heads, None, dim // self.num_heads)
            self.rotary.build(head_shape, grid_shape)
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
        return LayerNormalization(
            epsilon=self.epsilon, dtype=self.dtype_policy, name=name
        )

    def compute_output_shape(self, tokens_shape, grid_shape=None):
        return tokens_shape

    def call(self, tokens, grid=None, residual=None, training=None):
        batch, length = kernels.rows(tokens)
        dim = tokens.shape[-1]
        head_dim = dim // self.num_heads
        qkv = kernels.dense(self.qkv, tokens)  # (B, N, 3 D)
        qkv = ops.reshape(qkv, (batch, length, 3, self.num_heads, head_dim))
        qkv = ops.transpose(qkv, (2, 0, 3, 1, 4))  # (3, B, H, N, d)
        query, key, value = ops.unstack(qkv, 3)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None:
            query, key = self.rotary(query, grid), self.rotary(key, grid)
        bias = None if self.bias is None else self.bias(tokens, grid)
        dropout = _dropout_of_weights(self.attention_dropout, training)
        x = kernels.attention(query, key, value, self.scale, dropout, bias)
        x = ops.transpose(x, (0, 2, 1, 3))  # (B, N, H, d)
        x = ops.reshape(x, (batch, length, dim))
        return added(self.project, x, residual, self.dropout, training)


def added(layer, x, residual, dropout, training):
    """What a Dense makes of `x` `(B, N, _)`, some of it dropped, and the residual."""
    if not (training and dropout.rate):
        return kernels.dense(layer, x, residual=residual)
    x = dropout(kernels.dense(layer, x), training=True)
    return x if residual is None else residual + x


def _dropout_of_weights(dropout, training):
    if not training or not dropout.rate:
        return None
    return lambda weights: dropout(weights, training=True)


@serializable
class SpatialReductionAttention(layers.Layer):
    """Multi-head attention of all tokens to a grid that is r times smaller a side.

        SRA(z) = MSA(queries z U_q, keys and values [SR(z)] U_kv)
        SR(z)  = LN(Conv_r(z)),  kernel and stride r; z itself where r = 1

    Source: Wang et al. 2021, "Pyramid Vision Transformer", section 3.3,
    https://arxiv.org/abs/2102.12122.
    Differs from the source in that a grid whose size is only known at run time is
    padded with zeros on the right and at the bottom to a multiple of r.

    Args:
        num_heads: H; must divide D.
        sr_ratio: r.
        qkv_bias: Whether queries, keys and values have a bias.
        dropout: Rate in [0, 1) on the output.
        attention_dropout: Rate in [0, 1) on the attention weights.
        epsilon: Added to the variance by the LayerNorm of the reduced grid.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, h * w, D)`.
        grid: `(B, h, w, _)`; only its shape is used.

    Returns:
        `(B, h * w, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D, or r a static h or w.
    """

    def __init__(
        self,
        num_heads,
        sr_ratio=1,
        qkv_bias=True,
        dropout=0.0,
        attention_dropout=0.0,
        epsilon=1e-5,
        initialization="twins",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.qkv_bias = qkv_bias
        self.epsilon = epsilon
        self.initialization = initialization
        self.dropout = layers.Dropout(
            dropout, noise_shape=(None, None, None), dtype=self.dtype_policy
        )
        self.attention_dropout = layers.Dropout(
            attention_dropout, noise_shape=(None,) * 4, dtype="float32"
        )

    def build(self, tokens_shape, grid_shape):
        dim = tokens_shape[-1]
        if dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide D, got D={dim}.")
        self.scale = (dim // self.num_heads) ** -0.5
        self.query = self._dense(dim, self.qkv_bias, "query")
        self.key_value = self._dense(2 * dim, self.qkv_bias, "key_value")
        self.project = self._dense(dim, True, "project")
        for layer in (self.query, self.key_value, self.project):
            layer.build((None, dim))
        if self.sr_ratio > 1:
            self.reduce = PatchEmbedding(
                dim,
                self.sr_ratio,
                self.initialization,
                dtype=self.dtype_policy,
                name="reduce",
            )
            self.norm = LayerNormalization(
                epsilon=self.epsilon, dtype=self.dtype_policy, name="norm"
            )
            self.reduce.build((*grid_shape[:3], dim))
            self.norm.build((None, None, dim))

    def _dense(self, units, use_bias, name):
        return layers.Dense(
            units,
            use_bias=use_bias,
            kernel_initializer=initializer(self.initialization, "attention_kernel"),
            dtype=self.dtype_policy,
            name=name,
        )

    def compute_output_shape(self, tokens_shape, grid_shape):
        return tokens_shape

    def call(self, tokens, grid, residual=None, training=None):
        batch, length = kernels.rows(tokens)
        dim = tokens.shape[-1]
        head_dim = dim // self.num_heads
        query = kernels.dense(self.query, tokens)
        query = ops.reshape(query, (batch, length, self.num_heads, head_dim))
        query = ops.transpose(query, (0, 2, 1, 3))  # (B, H, h w, d)
        reduced = self._reduce(tokens, grid)  # (B, M, D)
        x = kernels.dense(self.key_value, reduced)  # (B, M, 2 D)
        shape = (*kernels.rows(reduced), 2, self.num_heads, head_dim)
        x = ops.transpose(ops.reshape(x, shape), (2, 0, 3, 1, 4))  # (2, B, H, M, d)
        dropout = _dropout_of_weights(self.attention_dropout, training)
        x = kernels.attention(query, *ops.unstack(x, 2), self.scale, dropout)
        x = ops.transpose(x, (0, 2, 1, 3))  # (B, h w, H, d)
        x = ops.reshape(x, (batch, length, dim))
        return added(self.project, x, residual, self.dropout, training)

    def _reduce(self, tokens, grid):
        if self.sr_ratio == 1:
            return tokens
        dim = tokens.shape[-1]
        grid = self.reduce(ops.reshape(tokens, (*ops.shape(grid)[:3], dim)))
        batch, height, width = ops.shape(grid)[:3]
        return self.norm(ops.reshape(grid, (batch, height * width, dim)))
