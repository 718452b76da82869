"""The pre-norm transformer block that every model in this package stacks, and parts.

Shapes in this file:
    B batch, N tokens, D embedding.
"""

import functools

import keras
from keras import layers

from keras_vit import kernels
from keras_vit.attention import (
    SelfAttention,
    SpatialReductionAttention,
    added,
)
from keras_vit.initialization import initializer
from keras_vit.normalization import LayerNormalization
from keras_vit.rematerialization import Rematerialized

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class LayerScale(layers.Layer):
    """Multiply each channel by a learned factor that starts small.

    Source: Touvron et al. 2021, "Going deeper with Image Transformers", eq. 4,
    https://arxiv.org/abs/2103.17239.

    Args:
        initial_value: Start value of every factor.

    Call arguments:
        tokens: `(B, N, D)`.

    Returns:
        `(B, N, D)`.
    """

    def __init__(self, initial_value=1e-5, **kwargs):
        super().__init__(**kwargs)
        self.initial_value = initial_value

    def build(self, tokens_shape):
        self.gamma = self.add_weight(
            shape=(tokens_shape[-1],),
            initializer=keras.initializers.Constant(self.initial_value),
            name="gamma",
        )

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def call(self, tokens):
        return tokens * self.gamma


@serializable
class MLP(layers.Layer):
    """Two Dense layers with a GELU between them, applied to every token.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", section 3.1,
    https://arxiv.org/abs/2010.11929. GELU and both its approximations: Hendrycks and
    Gimpel 2016, "Gaussian Error Linear Units", section 2,
    https://arxiv.org/abs/1606.08415.

    Args:
        mlp_ratio: Hidden width, as a multiple of D; the product is rounded.
        gelu: `"exact"` (erf), `"tanh"` (the approximation that Flax uses) or `"quick"`
            (x * sigmoid(1.702 x), which OpenAI's CLIP uses).
        dropout: Rate in [0, 1) after the GELU and on the output.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, N, D)`.

    Returns:
        `(B, N, D)`.

    Raises:
        ValueError: If `gelu` is unknown.
    """

    def __init__(
        self, mlp_ratio=4.0, gelu="exact", dropout=0.0, initialization="jax", **kwargs
    ):
        super().__init__(**kwargs)
        if gelu not in ("exact", "tanh", "quick"):
            raise ValueError(f"gelu must be 'exact', 'tanh' or 'quick', got {gelu!r}.")
        self.mlp_ratio = mlp_ratio
        self.gelu = gelu
        self.initialization = initialization
        self.dropout = layers.Dropout(
            dropout, noise_shape=(None, None, None), dtype=self.dtype_policy
        )

    def build(self, tokens_shape):
        dim = tokens_shape[-1]
        hidden = round(dim * self.mlp_ratio)
        self.expand = self._dense(hidden, "expand")
        self.reduce = self._dense(dim, "reduce")
        self.expand.build((None, dim))
        self.reduce.build((None, hidden))

    def _dense(self, units, name):
        return layers.Dense(
            units,
            kernel_initializer=initializer(self.initialization, "mlp_kernel"),
            bias_initializer=initializer(self.initialization, "mlp_bias"),
            dtype=self.dtype_policy,
            name=name,
        )

    def compute_output_shape(self, tokens_shape):
        return tokens_shape

    def call(self, tokens, residual=None, training=None):
        x = kernels.dense(self.expand, tokens, self.gelu)
        x = self.dropout(x, training=training)
        return added(self.reduce, x, residual, self.dropout, training)


@serializable
class TransformerBlock(Rematerialized, layers.Layer):
    """Pre-norm transformer block with stochastic depth and, if wanted, LayerScale.

        z' = z  + DropPath(scale1 * MSA(LN(z))) / s     (2)
        z  = z' + DropPath(scale2 * MLP(LN(z'))) / s    (3)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", equations 2-3,
    https://arxiv.org/abs/2010.11929. DropPath is stochastic depth, Huang et al. 2016,
    https://arxiv.org/abs/1603.09382: a sample skips the branch, and the branches that
    remain are divided by the probability of remaining. s is the residual divisor of
    LV-ViT, Jiang et al. 2021, https://arxiv.org/abs/2104.10858; 1 in all other models.

    Args:
        num_heads: Number of attention heads; must divide D.
        mlp_ratio: Hidden width of the MLP, as a multiple of D.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalised.
        layer_scale: Start value of LayerScale on both branches; None for none.
        gelu: `"exact"`, `"tanh"` or `"quick"`.
        dropout: Rate in [0, 1) on both branches and inside the MLP.
        attention_dropout: Rate in [0, 1) on the attention weights.
        drop_path: Probability in [0, 1] that a sample skips a branch.
        epsilon: Added to the variance by every LayerNorm.
        initialization: Key of `INITIALIZATIONS`.
        position: `"relative"`, `"rotary"` or None, as in `SelfAttention`.
        residual_scale: s, the divisor of both branches; positive.

    Call arguments:
        tokens: `(B, N, D)`.
        grid: `(B, h, w, _)`; only its shape is used, and only if there is a `position`.

    Returns:
        `(B, N, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D, `gelu` or `position` is unknown,
            or `residual_scale` is not positive.
    """

    def __init__(
        self,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_norm=False,
        layer_scale=None,
        gelu="exact",
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        epsilon=1e-6,
        initialization="jax",
        position=None,
        residual_scale=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if residual_scale <= 0:
            raise ValueError(f"residual_scale must be positive, got {residual_scale}.")
        policy = self.dtype_policy
        self.residual_scale = residual_scale
        self.norm1 = LayerNormalization(epsilon=epsilon, dtype=policy, name="norm1")
        self.attention = self._attention(
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            dropout=dropout,
            attention_dropout=attention_dropout,
            epsilon=epsilon,
            initialization=initialization,
            position=position,
        )
        self.norm2 = LayerNormalization(epsilon=epsilon, dtype=policy, name="norm2")
        self.mlp = MLP(
            mlp_ratio, gelu, dropout, initialization, dtype=policy, name="mlp"
        )
        if layer_scale is None:
            self.scale1 = self.scale2 = None
        else:
            self.scale1 = LayerScale(layer_scale, dtype=policy, name="scale1")
            self.scale2 = LayerScale(layer_scale, dtype=policy, name="scale2")
        self.drop_path = layers.Dropout(  # one draw a sample, not an element
            drop_path, noise_shape=(None, 1, 1), dtype=policy
        )

    def _attention(self, **kwargs):
        return SelfAttention(**kwargs, dtype=self.dtype_policy, name="attention")

    def build(self, tokens_shape, grid_shape=None):
        self.attention.build(tokens_shape, grid_shape)
        for layer in (self.norm1, self.norm2, self.mlp):
            layer.build(tokens_shape)
        if self.scale1 is not None:
            self.scale1.build(tokens_shape)
            self.scale2.build(tokens_shape)

    def compute_output_shape(self, tokens_shape, grid_shape=None):
        return tokens_shape

    def call(self, tokens, grid=None, training=None):
        attention = functools.partial(self.attention, grid=grid, training=training)
        mlp = functools.partial(self.mlp, training=training)
        tokens = self._add(tokens, attention, self.norm1, self.scale1, training)
        return self._add(tokens, mlp, self.norm2, self.scale2, training)

    def _add(self, tokens, branch, norm, scale, training):
        drops = training and self.drop_path.rate
        if scale is None and self.residual_scale == 1 and not drops:
            return branch(norm(tokens), residual=tokens)  # which can be one operation
        branch = branch(norm(tokens))
        if scale is not None:
            branch = scale(branch)
        branch = self.drop_path(branch, training=training)
        if self.residual_scale != 1:
            branch = branch / self.residual_scale
        return tokens + branch


@serializable
class PyramidBlock(TransformerBlock):
    """The same block with spatial-reduction attention, for grids of many tokens.

    Source: Wang et al. 2021, "Pyramid Vision Transformer", section 3.3,
    https://arxiv.org/abs/2102.12122.

    Args:
        num_heads: Number of attention heads; must divide D.
        sr_ratio: How many times smaller a side the grid of keys and values is.
        mlp_ratio: Hidden width of the MLP, as a multiple of D.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: `"exact"`, `"tanh"` or `"quick"`.
        dropout: Rate in [0, 1) on both branches and inside the MLP.
        attention_dropout: Rate in [0, 1) on the attention weights.
        drop_path: Probability in [0, 1] that a sample skips a branch.
        epsilon: Added to the variance by the two LayerNorms of the block.
        reduction_epsilon: Added to the variance by that of the reduced grid.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, h * w, D)`.
        grid: `(B, h, w, _)`; only its shape is used.

    Returns:
        `(B, h * w, D)`.

    Raises:
        ValueError: If `num_heads` does not divide D, `gelu` is unknown, or `sr_ratio`
            does not divide a static grid.
    """

    def __init__(
        self,
        num_heads,
        sr_ratio=1,
        mlp_ratio=4.0,
        qkv_bias=True,
        gelu="exact",
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
        epsilon=1e-6,
        reduction_epsilon=1e-5,
        initialization="twins",
        **kwargs,
    ):
        self.sr_ratio = sr_ratio
        self.reduction_epsilon = reduction_epsilon
        super().__init__(
            num_heads,
            mlp_ratio,
            qkv_bias,
            gelu=gelu,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            epsilon=epsilon,
            initialization=initialization,
            **kwargs,
        )

    def _attention(self, num_heads, qkv_bias, dropout, initialization, **kwargs):
        return SpatialReductionAttention(
            num_heads,
            self.sr_ratio,
            qkv_bias,
            dropout,
            kwargs["attention_dropout"],
            self.reduction_epsilon,
            initialization,
            dtype=self.dtype_policy,
            name="attention",
        )
