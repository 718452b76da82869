"""Position encodings of tokens; `keras_vit.relative` has those of attention.

    LearnedPosition, SinCosPosition   added to the tokens before the first block
    PEG                               a convolution of the tokens between two blocks

Each works at any grid, and takes the grid as its second argument, of which it uses the
shape alone.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, of which the
    first K have a position, D embedding.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_vit import kernels
from keras_vit.initialization import initializer
from keras_vit.resampling import check_method, resample

serializable = keras.saving.register_keras_serializable("keras_vit")


def places(height, width):
    """Column and row of every patch in reading order: two `(N,)`, float32."""
    place = ops.arange(height * width, dtype="int32")
    return tuple(ops.cast(x, "float32") for x in (place % width, place // width))


def angles(place, temperature, exponent):
    """`place * temperature ** -exponent`: `(N,)` and NumPy `(t,)` to `(N, t)`."""
    frequency = (temperature**-exponent).astype("float32")
    return place[:, None] * ops.convert_to_tensor(frequency)[None]


@serializable
class LearnedPosition(layers.Layer):
    """Add one learned vector to each token, resampled when the grid is another.

        z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos     (1)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1,
    https://arxiv.org/abs/2010.11929; the resampling is that of section 3.2, in float32,
    by the method of one of the published codes (`keras_vit.resampling`).

    A file of weights remembers the grid of its table. Loaded into a layer of another
    grid the table is resampled, also where both have the same number of tokens.

    Args:
        num_prefix: R, number of tokens before the patches.
        num_prefix_positions: K, how many of these, from the first, have a position.
        table_grid: `(h, w)` of the stored table; None for that of the first input.
        initialization: Key of `INITIALIZATIONS`.
        resampling: `"bicubic_antialias"` (timm), `"bicubic"` (DeiT, LV-ViT),
            `"linear"` (timm's reader of `.npz` files) or `"linear_corners"` (the ViT
            paper's own code).

    Call arguments:
        tokens: `(B, R + N, D)`.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(B, R + N, D)`.

    Raises:
        ValueError: If K exceeds R, `resampling` is unknown, the grid is dynamic and
            `table_grid` is None, or a file's table has another K or D.
    """

    def __init__(
        self,
        num_prefix=1,
        num_prefix_positions=1,
        table_grid=None,
        initialization="jax",
        resampling="bicubic_antialias",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_method(resampling)
        if num_prefix_positions > num_prefix:
            raise ValueError(
                f"num_prefix_positions={num_prefix_positions} must not exceed "
                f"num_prefix={num_prefix}."
            )
        self.num_prefix = num_prefix
        self.num_prefix_positions = num_prefix_positions
        self.table_grid = None if table_grid is None else tuple(table_grid)
        self.initialization = initialization
        self.resampling = resampling

    def build(self, tokens_shape, grid_shape):
        self.stored_grid = self.table_grid or tuple(grid_shape[1:3])
        if None in self.stored_grid:
            raise ValueError(
                "table_grid must be given where the grid is dynamic, "
                f"got table_grid=None and a grid of {grid_shape[1]} x {grid_shape[2]}."
            )
        height, width = self.stored_grid
        self.table = self.add_weight(
            shape=(1, self.num_prefix_positions + height * width, tokens_shape[-1]),
            initializer=initializer(self.initialization, "position"),
            autocast=False,
            name="table",
        )

    def compute_output_shape(self, tokens_shape, grid_shape):
        return tokens_shape

    def call(self, tokens, grid):
        prefix = self.table[:, : self.num_prefix_positions]
        patches = self.table[:, self.num_prefix_positions :]
        new_grid = ops.shape(grid)[1:3]
        patches = resample(patches, self.stored_grid, new_grid, self.resampling)
        without = self.num_prefix - self.num_prefix_positions
        parts = [prefix, ops.zeros((1, without, tokens.shape[-1])), patches]
        position = ops.concatenate([x for x in parts if x.shape[1] != 0], axis=1)
        return tokens + ops.cast(position, tokens.dtype)

    def save_own_variables(self, store):
        store["table"] = ops.convert_to_numpy(self.table)
        store["grid"] = np.asarray(self.stored_grid, "int32")

    def load_own_variables(self, store):
        table = np.asarray(store["table"])
        grid = tuple(int(side) for side in np.asarray(store["grid"]))
        num_prefix_positions = table.shape[1] - grid[0] * grid[1]
        expected = (self.num_prefix_positions, self.table.shape[-1])
        if (num_prefix_positions, table.shape[-1]) != expected:
            raise ValueError(
                f"{self.name}: the file's position table has {num_prefix_positions} "
                f"prefix positions and D={table.shape[-1]}, the model has "
                f"{expected[0]} and D={expected[1]}."
            )
        prefix, patches = np.split(table, [num_prefix_positions], axis=1)
        patches = resample(patches, grid, self.stored_grid, self.resampling)
        patches = ops.convert_to_numpy(patches)
        self.table.assign(np.concatenate([prefix, patches], axis=1))


@serializable
class SinCosPosition(layers.Layer):
    """Add fixed sines and cosines of the place to each patch token.

    With two dimensions, for the column x and the row y of a patch, t = 0 .. D/4 - 1,

        [sin(w_t x), cos(w_t x), sin(w_t y), cos(w_t y)],  w_t = T^(-t / (D/4 - 1))

    With one, for the place n in reading order, in channels 2t and 2t + 1,

        sin(n T^(-2t / D)), cos(n T^(-2t / D))

    Source: two: Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k",
    https://arxiv.org/abs/2205.01580, its code; one: Vaswani et al. 2017, "Attention Is
    All You Need", section 3.5, https://arxiv.org/abs/1706.03762.

    Args:
        num_prefix: R, number of tokens before the patches; they get no position.
        dimensions: 1 or 2.
        temperature: T.

    Call arguments:
        tokens: `(B, R + N, D)`; D must be a multiple of 4, or of 2 in one dimension.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(B, R + N, D)`.

    Raises:
        ValueError: If `dimensions` is neither 1 nor 2, or D is no such multiple.
    """

    def __init__(self, num_prefix=0, dimensions=2, temperature=10_000.0, **kwargs):
        super().__init__(**kwargs)
        if dimensions not in (1, 2):
            raise ValueError(f"dimensions must be 1 or 2, got {dimensions!r}.")
        self.num_prefix = num_prefix
        self.dimensions = dimensions
        self.temperature = temperature

    def build(self, tokens_shape, grid_shape):
        dim, multiple = tokens_shape[-1], 2 * self.dimensions
        if dim % multiple:
            raise ValueError(f"D must be a multiple of {multiple}, got D={dim}.")

    def compute_output_shape(self, tokens_shape, grid_shape):
        return tokens_shape

    def call(self, tokens, grid):
        height, width = ops.shape(grid)[1:3]
        encode = self._one if self.dimensions == 1 else self._two
        position = encode(height, width, tokens.shape[-1])[None]  # (1, N, D)
        position = ops.pad(position, ((0, 0), (self.num_prefix, 0), (0, 0)))
        return tokens + ops.cast(position, tokens.dtype)

    def _one(self, height, width, dim):
        place = ops.cast(ops.arange(height * width, dtype="int32"), "float32")
        x = angles(place, self.temperature, np.arange(dim // 2) / (dim / 2))
        pairs = ops.stack([ops.sin(x), ops.cos(x)], axis=-1)  # (N, D / 2, 2)
        return ops.reshape(pairs, (height * width, dim))

    def _two(self, height, width, dim):
        exponent = np.arange(dim // 4) / max(dim // 4 - 1, 1)
        turns = [angles(x, self.temperature, exponent) for x in places(height, width)]
        waves = [wave(x) for x in turns for wave in (ops.sin, ops.cos)]
        return ops.concatenate(waves, axis=-1)  # (N, D)


@serializable
class PEG(layers.Layer):
    """Position Encoding Generator: a depthwise convolution of the grid, and itself.

        y = x + DWConv_k(x)

    The tokens see where they are by the zeros around the grid. Prefix tokens pass.

    Source: Chu et al. 2021, "Conditional Positional Encodings for Vision Transformers",
    section 3.3, https://arxiv.org/abs/2102.10882.

    Args:
        kernel_size: k, odd.
        padding: `"zeros"` (the paper); `"circular"`, the grid's other side; or
            `"none"`, no padding: a token whose neighbourhood leaves the grid gets no
            encoding. The last two cannot tell where the border is, or are blind there.
        num_prefix: R, number of tokens before the patches.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, R + N, D)`.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(B, R + N, D)`.

    Raises:
        ValueError: If k is not an odd positive int, or `padding` is unknown.
    """

    def __init__(
        self,
        kernel_size=3,
        padding="zeros",
        num_prefix=0,
        initialization="deit",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, such as 3, got {kernel_size!r}."
            )
        if padding not in ("zeros", "circular", "none"):
            raise ValueError(
                f"padding must be 'zeros', 'circular' or 'none', got {padding!r}."
            )
        self.kernel_size = kernel_size
        self.padding = padding
        self.num_prefix = num_prefix
        self.initialization = initialization

    def build(self, tokens_shape, grid_shape):
        size, dim = self.kernel_size, tokens_shape[-1]
        fans = size * size, size * size
        self.kernel = self.add_weight(
            shape=(size, size, dim, 1),
            initializer=initializer(self.initialization, "peg_kernel", *fans),
            name="kernel",
        )
        self.bias = self.add_weight(
            shape=(dim,),
            initializer=initializer(self.initialization, "peg_bias", *fans),
            name="bias",
        )

    def compute_output_shape(self, tokens_shape, grid_shape):
        return tokens_shape

    def call(self, tokens, grid):
        batch, height, width = ops.shape(grid)[:3]
        dim = tokens.shape[-1]
        patches = tokens[:, self.num_prefix :]
        x = ops.reshape(patches, (batch, height, width, dim))
        x = self._encoding(x, height, width)
        patches = patches + ops.reshape(x, (batch, height * width, dim))
        if not self.num_prefix:
            return patches
        return ops.concatenate([tokens[:, : self.num_prefix], patches], axis=1)

    def _encoding(self, x, height, width):
        margin = self.kernel_size // 2
        if self.padding == "circular":
            for axis, side in ((1, height), (2, width)):
                places = ops.arange(side + 2 * margin, dtype="int32") - margin
                x = ops.take(x, places % side, axis=axis)
            x = kernels.depthwise_convolution(x, self.kernel)
            x = x[:, margin : margin + height, margin : margin + width]
        else:
            x = kernels.depthwise_convolution(x, self.kernel)
        x = x + ops.cast(self.bias, x.dtype)
        if self.padding == "none":
            inside = [
                _inside(ops.arange(side, dtype="int32"), margin, side)
                for side in (height, width)
            ]
            mask = ops.logical_and(inside[0][:, None], inside[1][None])
            x = x * ops.cast(mask[None, :, :, None], x.dtype)
        return x


def _inside(place, margin, side):
    return ops.logical_and(place >= margin, place < side - margin)
