"""Resizing of position tables and feature maps by one matrix an axis.

Shapes in this file:
    h x w grid of the source, h' x w' of the result, D channels.
"""

import numpy as np
from keras import ops

METHODS = ("bicubic_antialias", "bicubic", "linear", "linear_corners")


def resize_matrix(new, old, method="bicubic_antialias"):
    """Matrix of interpolation along one axis: `y_i = sum_j W_ij x_j`.

    `"bicubic_antialias"`: timm's `resample_abs_pos_embed`; Keys' kernel k (a = -0.5),
    widened where the result is smaller, rows that sum to 1:

        W_ij ~ k((j + 1/2 - (i + 1/2) s) / max(s, 1)),  s = old / new

    `"bicubic"`: DeiT's and LV-ViT's fine-tuning; Keys' kernel (a = -0.75), never
    widened, pixels outside repeat the border. `"linear"`: the same with a triangle, as
    timm reads the `.npz` files of the ViT paper. `"linear_corners"`: linear between
    grids whose first and last points coincide, the ViT paper's own code.

    Args:
        new: Length of the result: an int, or a scalar tensor of the running graph.
        old: Length of the source, likewise.
        method: One of `METHODS`.

    Returns:
        `(new, old)`, float32: a NumPy array for two ints, else a tensor.

    Raises:
        ValueError: If `method` is unknown.
    """
    check_method(method)
    xp = np if isinstance(new, int) and isinstance(old, int) else ops
    length, source = (xp.cast(x, "float32") if xp is ops else x for x in (new, old))
    i, j = _arange(xp, new)[:, None], _arange(xp, old)[None, :]
    if method == "linear_corners":
        scale = (source - 1) / xp.maximum(length - 1, 1)
        return _taps(xp, i * scale, j, source, _triangle, 2)
    scale = source / length
    centre = (i + 0.5) * scale - 0.5
    if method == "linear":
        return _taps(xp, centre, j, source, _triangle, 2)
    if method == "bicubic":
        return _taps(xp, centre, j, source, lambda xp, t: _cubic(xp, t, -0.75), 4)
    weight = _cubic(xp, (centre - j) / xp.maximum(scale, 1.0), -0.5)
    weight = weight / xp.sum(weight, axis=1, keepdims=True)
    return weight.astype("float32") if xp is np else weight


def check_method(method):
    """Raise a ValueError unless `method` is one of `METHODS`."""
    if method not in METHODS:
        known = ", ".join(repr(x) for x in METHODS)
        raise ValueError(f"resampling must be one of {known}, got {method!r}.")


def _arange(xp, stop):
    if xp is np:
        return np.arange(stop, dtype="float64")
    return ops.cast(ops.arange(stop, dtype="int32"), "float32")


def _triangle(xp, t):
    return xp.maximum(1.0 - xp.abs(t), 0.0)


def _cubic(xp, t, a):
    """Keys' kernel, https://doi.org/10.1109/TASSP.1981.1163711, with parameter a."""
    t = xp.abs(t)
    near = ((a + 2) * t - (a + 3)) * t * t + 1.0  # t < 1
    far = a * (((t - 5) * t + 8) * t - 4)  # 1 <= t < 2
    return xp.where(t < 1, near, xp.where(t < 2, far, xp.zeros_like(t)))


def _taps(xp, centre, j, old, kernel, count):
    """Weights of the `count` nearest pixels; one outside counts for the border's."""
    first = xp.floor(centre) - (count // 2 - 1)
    weight = 0.0
    for k in range(count):
        tap = first + k
        column = xp.minimum(xp.maximum(tap, 0.0), old - 1.0)
        here = xp.equal(column, j)  # (new, old)
        value = kernel(xp, centre - tap)
        weight = weight + xp.where(here, value, xp.zeros_like(value))
    return weight.astype("float32") if xp is np else weight


def resize(x, new_grid, method):
    """Resize maps from one grid to another, non-square included.

    Args:
        x: `(..., h, w, D)`, float32.
        new_grid: `(h', w')`: ints or scalar tensors.
        method: One of `METHODS`.

    Returns:
        `(..., h', w', D)`; `x` itself where both grids are the same ints.
    """
    *batch, height, width, dim = ops.shape(x)
    new_height, new_width = new_grid
    if _same((height, width), (new_height, new_width)):
        return x
    rows = ops.convert_to_tensor(resize_matrix(new_height, height, method))
    columns = ops.convert_to_tensor(resize_matrix(new_width, width, method))
    rows, columns = (ops.cast(matrix, x.dtype) for matrix in (rows, columns))
    x = ops.matmul(rows, ops.reshape(x, (*batch, height, width * dim)))
    x = ops.reshape(x, (*batch, new_height, width, dim))
    return ops.matmul(columns, x)  # (..., h', w', D)


def resample(table, old_grid, new_grid, method="bicubic_antialias"):
    """Resample a position table from one grid to another.

    Args:
        table: `(1, h * w, D)`, float32.
        old_grid: `(h, w)` of the table, ints.
        new_grid: `(h', w')`: ints or scalar tensors.
        method: One of `METHODS`.

    Returns:
        `(1, h' * w', D)`; the table itself where the grids are the same ints.
    """
    if _same(tuple(old_grid), tuple(new_grid)):
        return table
    dim = table.shape[-1]
    x = resize(ops.reshape(table, (*old_grid, dim)), tuple(new_grid), method)
    return ops.reshape(x, (1, new_grid[0] * new_grid[1], dim))


def _same(old, new):
    return all(isinstance(side, int) for side in (*old, *new)) and old == new
