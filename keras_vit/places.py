"""What a model knows of places: how alike the positions of its patches are.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, D embedding.
"""

import numpy as np
from keras import ops

from keras_vit.attention import SelfAttention
from keras_vit.inspection import attention_maps, check_square, checked_images, grid_of
from keras_vit.nodes import block_name, prefix_length
from keras_vit.transformer import TransformerBlock


def position_kind(model):
    """How a model knows where its patches are.

    Returns:
        `"table"`, `"sincos"`, `"relative"`, `"rotary"`, `"peg"` or `"none"`; a table
        with a PEG is a `"table"`.
    """
    layers = {layer.name: layer for layer in model.layers}
    if "position" in layers:
        return "table" if hasattr(layers["position"], "table") else "sincos"
    blocks = [layer for layer in model.layers if isinstance(layer, TransformerBlock)]
    attention = getattr(blocks[0], "attention", None) if blocks else None
    if isinstance(attention, SelfAttention):
        if attention.bias is not None:
            return "relative"
        if attention.rotary is not None:
            return "rotary"
    return "peg" if any("peg" in name for name in layers) else "none"


def position_similarity(model, images=None, *, grid=None, block=None):
    """How alike the positions of every two patches are.

    - A table, or sines and cosines: the cosine of the angle between two positions, as
      the model adds them, `p_i . p_j / (|p_i| |p_j|)`, prefix tokens left out.
    - Rotary: the same of one vector, all ones, turned as a query at i and a key at j.
    - A relative bias: the bias of `block`, mean over heads; no cosine.
    - PEG: there are no positions but those that the images call up; the attention of
      `block` is taken instead, mean over images and heads, as the CPVT paper shows it.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", figure 7, centre,
    https://arxiv.org/abs/2010.11929; Chu et al. 2021, "Conditional Positional Encodings
    for Vision Transformers", https://arxiv.org/abs/2102.10882.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`, for a PEG; of others the grid, where nothing else says.
        grid: `(h, w)`; None for that of the model's `image_size`, or of its table.
        block: Number of a block, for a PEG or a relative bias; None for the second, as
            in the CPVT paper, or the only one.

    Returns:
        `(h, w, h, w)`, float32: of patch (y, x) the similarities to all.

    Raises:
        ValueError: If the model is a pyramid or has no position, a PEG has no images,
            there is no such block, or the grid is not known.
    """
    check_square(model, "Position similarity")
    kind = position_kind(model)
    if kind == "none":
        raise ValueError(
            f"{model.name!r} must have a position, a table or a PEG; it has none."
        )
    if kind == "peg":
        if images is None:
            raise ValueError(
                f"images must be given for {model.name!r}: its PEG makes positions of "
                "what it sees."
            )
        images = checked_images(model, images)
        height, width, num_prefix = grid_of(model, images)
        weights = attention_maps(model, images)[shown_block(model, block)]
        weights = weights[:, :, num_prefix:, num_prefix:]
        found = weights.mean((0, 1))
    else:
        height, width = grid or _known_grid(model, images)
        found = _SIMILARITY[kind](model, height, width, block)
    return found.reshape(height, width, height, width).astype("float32")


def shown_block(model, block):
    """Name of the block that stands for positions."""
    blocks = [layer for layer in model.layers if isinstance(layer, TransformerBlock)]
    return block_name(model, min(1, len(blocks) - 1) if block is None else block)


def _known_grid(model, images):
    shape = model.get_layer("patches").output.shape[1:3]
    position = [layer for layer in model.layers if layer.name == "position"]
    if None in shape and position:
        shape = getattr(position[0], "stored_grid", shape)
    if None in shape and images is not None:
        return grid_of(model, checked_images(model, images))[:2]
    if None in shape:
        raise ValueError(
            f"grid=(h, w), or images, must be given for {model.name!r}, which takes "
            "any size."
        )
    return shape


def _of_vectors(model, height, width, block):
    layer = model.get_layer("position")
    dim, num_prefix = model.get_layer("position").output.shape[-1], prefix_length(model)
    tokens = ops.zeros((1, num_prefix + height * width, dim))
    position = layer(tokens, ops.zeros((1, height, width, dim)))
    position = ops.convert_to_numpy(ops.cast(position, "float32"))[0, num_prefix:]
    return _cosines(position, position)


def _of_rotary(model, height, width, block):
    attention = model.get_layer("block0").attention  # alike in all
    width_of_head = attention.qkv.units // 3 // attention.num_heads
    ones = ops.ones((1, 1, height * width, width_of_head))
    turned = attention.rotary(ones, ops.zeros((1, height, width, 1)))
    turned = ops.convert_to_numpy(ops.cast(turned, "float32"))[0, 0]
    return _cosines(turned, turned)


def _of_bias(model, height, width, block):
    bias = model.get_layer(shown_block(model, block)).attention.bias
    tokens = ops.zeros((1, height * width, 1))
    found = bias(tokens, ops.zeros((1, height, width, 1)))
    return ops.convert_to_numpy(ops.cast(found, "float32"))[0].mean(0)


def _cosines(a, b):
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    return a @ b.T


_SIMILARITY = {
    "table": _of_vectors,
    "sincos": _of_vectors,
    "rotary": _of_rotary,
    "relative": _of_bias,
}
