"""MixToken: two images mixed at the tokens, after the stem and before the position.

Shapes in this file:
    B batch, h x w patch grid, D embedding or classes.
"""

import keras
from keras import layers, ops

from keras_vit.encoder import unknown

serializable = keras.saving.register_keras_serializable("keras_vit")

SIDES = ("paper", "unbiased")


@serializable
class MixToken(layers.Layer):
    """Exchange a box of tokens between the images of a batch.

    One box for the whole batch: inside it, image i has the tokens of image B - 1 - i.
    The exchange is its own inverse, so the logits of the tokens are brought back to
    their images by the same call; row i then speaks of image i alone. Every token is
    of one image, where CutMix on pixels leaves patches that show two.

    The layer does nothing unless it is given a box: mixing without mixing the labels
    would be wrong, and only a trainer (`training.TokenLabeling`) does both.

    With lambda ~ U(0, 1), the sides of the box are h sqrt(1 - lambda) and
    w sqrt(1 - lambda), and
    `sides="paper"` is the paper's rule: rounded down, around a centre that is uniform
        on the grid, cut off at the border. It mixes less than lambda says, and on small
        grids much less: the part that keeps its tokens is 0.86 in the mean on 4 x 4
        tokens, 0.73 on 14 x 14, and a quarter of the boxes on 4 x 4 is empty.
    `sides="unbiased"` rounds up or down at random and places the box inside the grid,
        so that the expected part that keeps its tokens is lambda, and 1/2 overall.

    Where a convolution follows, as in a model with PEG, tokens at the rim of the box
    see the other image within the reach of the kernel: one token for 3 x 3.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858.

    Args:
        sides: `"paper"` or `"unbiased"`.
        seed: Seed of the boxes; None for one from Keras' global seed.

    Call arguments:
        grid: `(B, h, w, D)`.
        box: int32 `(4,)`: first row, first column, last row + 1, last column + 1, as
            `draw_box` returns it; None leaves the grid as it is.

    Returns:
        `(B, h, w, D)`.

    Raises:
        ValueError: If `sides` is unknown.
    """

    def __init__(self, sides="paper", seed=None, **kwargs):
        super().__init__(**kwargs)
        if sides not in SIDES:
            raise ValueError(unknown("sides", sides, SIDES))
        self.sides = sides
        self.seed = seed
        self.random = keras.random.SeedGenerator(seed)

    def build(self, grid_shape, box_shape=None):
        pass

    def compute_output_shape(self, grid_shape, box_shape=None):
        return grid_shape

    def call(self, grid, box=None):
        if box is None:
            return grid
        inside = _inside(ops.shape(grid), box)[..., None]
        return ops.where(inside, ops.flip(grid, axis=0), grid)

    def draw_box(self, grid):
        """Draw the box of a batch.

        Args:
            grid: `(B, h, w, D)`; only its shape is used.

        Returns:
            int32 `(4,)`: first row, first column, last row + 1, last column + 1.
        """
        _, *sides, _ = ops.shape(grid)
        draw = keras.random.uniform((5,), seed=self.random)
        scale = ops.sqrt(1.0 - draw[0])
        edges = [
            self._edges(side, scale, draw[i], draw[i + 2])
            for i, side in enumerate(sides, 1)
        ]
        (top, bottom), (left, right) = edges
        return ops.cast(ops.stack([top, left, bottom, right]), "int32")

    def _edges(self, side, scale, place, rounding):
        """First and last + 1 along one axis of `side` tokens; all float32."""
        side = ops.cast(side, "float32")
        if self.sides == "paper":
            half = ops.floor(ops.floor(side * scale) / 2)
            centre = ops.floor(place * side)
            return ops.maximum(centre - half, 0.0), ops.minimum(centre + half, side)
        length = ops.minimum(ops.floor(side * scale + rounding), side)
        start = ops.floor(place * (side - length + 1))
        return start, start + length

    def kept(self, grid, box):
        """Part of the tokens that are outside the box, lambda': float32 scalar."""
        _, height, width, _ = ops.shape(grid)
        top, left, bottom, right = ops.unstack(ops.cast(box, "float32"), num=4)
        tokens = ops.cast(height * width, "float32")
        return 1.0 - (bottom - top) * (right - left) / tokens


def _inside(shape, box):
    """Which tokens of the grid are in the box: bool `(1, h, w)`."""
    _, height, width, _ = shape
    top, left, bottom, right = ops.unstack(box, num=4)
    rows, columns = ops.arange(height)[:, None], ops.arange(width)[None]
    rows = ops.logical_and(rows >= top, rows < bottom)
    columns = ops.logical_and(columns >= left, columns < right)
    return ops.logical_and(rows, columns)[None]
