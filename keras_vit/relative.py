"""Position encodings that stand in the attention, and know distances alone.

    RelativePositionBias   added to the logits
    RotaryPosition         turns queries and keys

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, H heads,
    D embedding, d = D / H.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_vit.initialization import initializer
from keras_vit.position import angles, places

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class RotaryPosition(layers.Layer):
    """Turn pairs of channels of queries and keys by angles that grow with the place.

    For the column x and the row y of a patch, t = 0 .. d/4 - 1, the pair of channels
    (t, t + d/2) is turned by w_t x and the pair (t + d/4, t + 3d/4) by w_t y,

        w_t = T^(-t / (d/4))

    so that the product of a query and a key depends on their distance alone.

    Source: Heo et al. 2024, "Rotary Position Embedding for Vision Transformer", axial
    frequencies (section 3), https://arxiv.org/abs/2403.13298.
    Differs from the source in which channels make a pair.

    Args:
        temperature: T.

    Call arguments:
        x: Queries or keys `(B, H, R + N, d)`; d must be a multiple of 4. The first R,
            all that the grid does not account for, are not turned.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(B, H, R + N, d)`.

    Raises:
        ValueError: If d is not a multiple of 4.
    """

    def __init__(self, temperature=100.0, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature

    def build(self, x_shape, grid_shape):
        if x_shape[-1] % 4:
            raise ValueError(
                "The width of a head, d = D / num_heads, must be a multiple of 4 for "
                f"rotary positions, got d={x_shape[-1]}."
            )

    def compute_output_shape(self, x_shape, grid_shape):
        return x_shape

    def call(self, x, grid):
        height, width = ops.shape(grid)[1:3]
        quarter = x.shape[-1] // 4
        exponent = np.arange(quarter) / quarter
        turns = [angles(p, self.temperature, exponent) for p in places(height, width)]
        turns = ops.concatenate(turns, axis=-1)  # (N, d / 2)
        num_prefix = ops.shape(x)[2] - height * width
        turns = ops.pad(turns, ((num_prefix, 0), (0, 0)))  # (R + N, d / 2)
        cosine, sine = (ops.cast(wave(turns), x.dtype) for wave in (ops.cos, ops.sin))
        a, b = x[..., : 2 * quarter], x[..., 2 * quarter :]
        turned = [a * cosine - b * sine, a * sine + b * cosine]
        return ops.concatenate(turned, axis=-1)


@serializable
class RelativePositionBias(layers.Layer):
    """A bias for each pair of patches, which a small network makes of their distance.

        B(dx, dy) = W_2 relu(W_1 [s(dx), s(dy)] + b_1),  s(x) = sign(x) log(1 + |x|)

    Source: Liu et al. 2022, "Swin Transformer V2", log-spaced continuous position bias,
    equations 3-4, https://arxiv.org/abs/2111.09883.
    Differs from the authors' code, which first scales distances to the window that was
    trained and squashes the bias to 0..16. Here distances count in patches at any
    grid, and pairs with a prefix token have the bias 0.

    Args:
        num_heads: H.
        hidden_dim: Width of the network.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, R + N, D)`; only its shape is used.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(1, H, R + N, R + N)`, for the attention logits.
    """

    def __init__(self, num_heads, hidden_dim=512, initialization="jax", **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        kernel = {"kernel_initializer": initializer(initialization, "mlp_kernel")}
        self.expand = layers.Dense(
            hidden_dim, "relu", **kernel, dtype=self.dtype_policy, name="expand"
        )
        self.reduce = layers.Dense(
            num_heads, use_bias=False, **kernel, dtype=self.dtype_policy, name="reduce"
        )

    def build(self, tokens_shape, grid_shape):
        self.expand.build((None, 2))
        self.reduce.build((None, self.expand.units))

    def compute_output_shape(self, tokens_shape, grid_shape):
        return (1, self.num_heads, tokens_shape[1], tokens_shape[1])

    def call(self, tokens, grid):
        height, width = ops.shape(grid)[1:3]
        spans = 2 * height - 1, 2 * width - 1
        place = ops.arange(spans[0] * spans[1], dtype="int32")
        right, down = place % spans[1] - (width - 1), place // spans[1] - (height - 1)
        distances = ops.cast(ops.stack([right, down], axis=-1), "float32")
        scaled = ops.sign(distances) * ops.log(1 + ops.abs(distances))
        biases = self.reduce(self.expand(scaled))  # (spans, H)

        place = ops.arange(height * width, dtype="int32")
        row, column = place // width, place % width
        down = row[:, None] - row[None] + (height - 1)
        right = column[:, None] - column[None] + (width - 1)
        bias = ops.take(biases, down * spans[1] + right, axis=0)  # (N, N, H)
        bias = ops.transpose(bias, (2, 0, 1))[None]
        prefix = (ops.shape(tokens)[1] - height * width, 0)
        return ops.pad(bias, ((0, 0), (0, 0), prefix, prefix))
