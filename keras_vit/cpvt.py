"""CPVT: a vision transformer whose positions come from a convolution of the tokens.

CPVT: "Conditional Positional Encodings for Vision Transformers",
https://arxiv.org/abs/2102.10882.
"""

import dataclasses

import keras

from keras_vit import encoder
from keras_vit.embedding import PatchEmbedding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(encoder.Encoder):
    """A row of `VARIANTS`: the fields of `Encoder`, and

    Args:
        peg_kernel_size: Side of the kernel of every PEG, odd.
        peg_padding: `"zeros"`, `"circular"` or `"none"`, as in `PEG`.
    """

    peg_kernel_size: int = 3
    peg_padding: str = "zeros"


def _cpvt(embed_dim, num_heads, **fields):
    """Widths, training and evaluation are those of DeiT."""
    return Variant(
        embed_dim=embed_dim,
        depth=12,
        num_heads=num_heads,
        crop_ratio=0.875,
        initialization="deit",
        interpolation="bicubic",
        normalization="imagenet",
        **fields,
    )


VARIANTS = {  # Table 1 of the paper
    "tiny": _cpvt(192, 3),
    "small": _cpvt(384, 6),
    "base": _cpvt(768, 12),
    "tiny_distilled": _cpvt(192, 3, distillation_token=True),
}


def CPVT(
    variant="tiny",
    *,
    image_size=None,
    patch_size=16,
    num_classes=1000,
    pool="class",
    peg_positions=(0,),
    num_registers=0,
    drop_path_rate=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    name=None,
    **overrides,
):
    """Conditional position vision transformer classifier; float32 logits.

    It has no position table: a `PEG` between the blocks tells the tokens where they
    are, so one model takes images of any size. `pool="mean"` is the paper's CPVT-GAP,
    and does without a class token too.

    Source: Chu et al. 2021, "Conditional Positional Encodings for Vision
    Transformers", https://arxiv.org/abs/2102.10882.

    Args:
        variant: Key of `VARIANTS`.
        image_size: Pixels: an int, `(height, width)`, or None for any size at run time
            (padded to whole patches).
        patch_size: Side of a patch, in pixels; must divide a given `image_size`.
        num_classes: Number of logits; 0 returns the pooled, normalised features.
        pool: `"class"` (class token), `"mean"` (CPVT-GAP) or `"attention"`.
        peg_positions: Indices of the blocks that a PEG follows; -1 is before the first
            block. The paper's default is `(0,)`, its "0-5" is `(0, 1, 2, 3, 4)`;
            without any, `()`, the model is blind to positions.
        num_registers: Number of register tokens.
        drop_path_rate: Drop path of the last block; it grows linearly from 0.
        dropout: Rate before and in every block.
        attention_dropout: Rate on the attention weights.
        name: Name of the model.
        **overrides: Fields of the row (`Variant`), such as `depth=6`,
            `peg_kernel_size=5` or `peg_padding="circular"`.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits
        `(B, num_classes)`, or to features `(B, D)` when `num_classes=0`. With a
        distillation token the logits are the mean of the nodes `head` and `head_dist`.

    Raises:
        ValueError: If the variant, the pooling or an override is unknown, sizes do not
            divide, there is no block of an index, a distillation token meets another
            pooling than `"class"`, or `labels` are not one for each class.
    """
    row = encoder.choose(CPVT, VARIANTS, variant, overrides)
    if isinstance(peg_positions, int):
        raise ValueError(
            f"peg_positions must be a tuple, such as ({peg_positions},), got "
            f"{peg_positions!r}."
        )
    images, x = encoder.normalized_images(row, image_size)
    grid = PatchEmbedding(
        row.embed_dim, patch_size, row.initialization, name="patches"
    )(x)
    x, _, num_prefix = encoder.prefix_tokens(grid, row, pool, num_registers)
    peg = {
        "kernel_size": row.peg_kernel_size,
        "padding": row.peg_padding,
        "num_prefix": num_prefix,
        "initialization": row.initialization,
    }
    x = encoder.blocks(
        encoder.dropout_layer(x, dropout),
        grid,
        row,
        drop_path_rate=drop_path_rate,
        dropout=dropout,
        attention_dropout=attention_dropout,
        pegs=dict.fromkeys(peg_positions, peg),
    )
    x = encoder.classify(x, row, pool, num_prefix, num_classes)
    return keras.Model(images, x, name=name or f"cpvt_{variant}{patch_size}")
