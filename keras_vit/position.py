"""Position encodings, and the resampling of a position table to another grid.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, of which the
    first K have a position, D embedding.
"""

import keras
import numpy as np
from keras import layers, ops

from keras_vit.initialization import initializer

serializable = keras.saving.register_keras_serializable("keras_vit")


def resize_matrix(new, old):
    """Matrix of antialiased bicubic interpolation along one axis.

        y_i = sum_j W_ij x_j
        W_ij ~ k((j + 1/2 - (i + 1/2) s) / max(s, 1)),  s = old / new

    with Keys' kernel k (a = -0.5), pixel centres at one half, and rows that sum to 1:
    what timm does to position tables (`resample_abs_pos_embed`).

    Args:
        new: Length of the result: an int, or a scalar tensor of the running graph.
        old: Length of the source, an int.

    Returns:
        `(new, old)`, float32: a NumPy array for an int, else a tensor.
    """
    xp = np if isinstance(new, int) else ops
    scale = old / xp.cast(new, "float32") if xp is ops else np.float32(old / new)
    centre = (_arange(xp, new) + 0.5) * scale
    distance = centre[:, None] - (_arange(xp, old) + 0.5)[None, :]
    t = xp.abs(distance / xp.maximum(scale, 1.0))
    near = (1.5 * t - 2.5) * t * t + 1.0  # t < 1
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0  # 1 <= t < 2
    weight = xp.where(t < 1, near, xp.where(t < 2, far, xp.zeros_like(t)))
    return weight / xp.sum(weight, axis=1, keepdims=True)


def _arange(xp, stop):
    if xp is np:
        return np.arange(stop, dtype="float32")
    return ops.cast(ops.arange(stop, dtype="int32"), "float32")


def resample(table, old_grid, new_grid):
    """Resample a position table from one grid to another, non-square included.

    Args:
        table: `(1, h * w, D)`, float32.
        old_grid: `(h, w)` of the table.
        new_grid: `(h', w')`: ints or scalar tensors.

    Returns:
        `(1, h' * w', D)`; the table itself where the grids are the same ints.
    """
    old_grid, new_grid = tuple(old_grid), tuple(new_grid)
    if all(isinstance(side, int) for side in new_grid) and old_grid == new_grid:
        return table
    dim = table.shape[-1]
    rows, columns = (
        ops.convert_to_tensor(resize_matrix(new, old))
        for new, old in zip(new_grid, old_grid, strict=True)
    )
    x = ops.reshape(table, (old_grid[0], old_grid[1] * dim))
    x = ops.reshape(ops.matmul(rows, x), (new_grid[0], old_grid[1], dim))
    x = ops.matmul(columns, x)  # (h', w', D)
    return ops.reshape(x, (1, new_grid[0] * new_grid[1], dim))


@serializable
class LearnedPosition(layers.Layer):
    """Add one learned vector to each token, resampled when the grid is another.

        z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos     (1)

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1,
    https://arxiv.org/abs/2010.11929; the resampling is that of section 3.2, by the
    method of timm's `resample_abs_pos_embed` (antialiased bicubic, in float32).

    A file of weights remembers the grid of its table. Loaded into a layer of another
    grid the table is resampled, also where both have the same number of tokens.

    Args:
        num_prefix: R, number of tokens before the patches.
        num_prefix_positions: K, how many of these, from the first, have a position.
        table_grid: `(h, w)` of the stored table; None for that of the first input.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        tokens: `(B, R + N, D)`.
        grid: `(B, h, w, D)`; only its shape is used.

    Returns:
        `(B, R + N, D)`.

    Raises:
        ValueError: If K exceeds R, the grid is dynamic and `table_grid` is None, or
            a file's table has another K or D.
    """

    def __init__(
        self,
        num_prefix=1,
        num_prefix_positions=1,
        table_grid=None,
        initialization="jax",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_prefix_positions > num_prefix:
            raise ValueError(
                f"num_prefix_positions={num_prefix_positions} must not exceed "
                f"num_prefix={num_prefix}."
            )
        self.num_prefix = num_prefix
        self.num_prefix_positions = num_prefix_positions
        self.table_grid = None if table_grid is None else tuple(table_grid)
        self.initialization = initialization

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
        patches = resample(patches, self.stored_grid, ops.shape(grid)[1:3])
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
        patches = ops.convert_to_numpy(resample(patches, grid, self.stored_grid))
        self.table.assign(np.concatenate([prefix, patches], axis=1))
