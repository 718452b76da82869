"""ViT, with DeiT and DeiT III as rows of `VARIANTS`.

ViT: "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
DeiT: "Training data-efficient image transformers & distillation through attention",
https://arxiv.org/abs/2012.12877. DeiT III: "Revenge of the ViT",
https://arxiv.org/abs/2204.07118.
"""

import dataclasses

import keras

from keras_vit import encoder
from keras_vit.embedding import PatchEmbedding
from keras_vit.position import LearnedPosition, SinCosPosition

POSITIONS = (
    "learned",
    "sincos_1d",
    "sincos_2d",
    "relative",
    "rotary",
    "learned_peg",
    "none",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(encoder.Encoder):
    """A row of `VARIANTS`: the fields of `Encoder`, and

    Args:
        class_position: Whether class and distillation token have a learned position.
        norm_after_pool: Whether `pool="mean"` normalises after the mean, not before.
        pre_norm: Whether a LayerNorm follows the position, before the first block; the
            patches have no bias then (CLIP).
        representation_size: Width of a Dense and a tanh between pooling and head (node
            `pre_logits`), as in the first checkpoints of the ViT paper; None for
            neither.
        resampling: How a learned table is resampled, as in `LearnedPosition`.
    """

    class_position: bool = True
    norm_after_pool: bool = False
    pre_norm: bool = False
    representation_size: int | None = None
    resampling: str = "bicubic_antialias"


def _vit(embed_dim, depth, num_heads, mlp_dim):
    """The paper's own code: google-research/vision_transformer, `models_vit.py`."""
    return Variant(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_dim / embed_dim,
        gelu="tanh",
    )


def _deit(embed_dim, num_heads, **fields):
    """facebookresearch/deit; its evaluation resizes to 256 and crops 224."""
    deit = {
        "crop_ratio": 0.875,
        "initialization": "deit",
        "interpolation": "bicubic",
        "norm_after_pool": True,
        "normalization": "imagenet",
        **fields,
    }
    depth = deit.pop("depth", 12)
    return Variant(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **deit)


_DEIT3 = {
    "class_position": False,
    "constant_drop_path": True,
    "crop_ratio": 1.0,
    "layer_scale": 1e-4,
}

VARIANTS = {
    # embed_dim, depth, num_heads, mlp_dim. Base to huge: Table 1 of ViT; tiny and
    # small: Table 1 of DeiT; giant and gigantic (g, G): Table 2 of "Scaling Vision
    # Transformers", https://arxiv.org/abs/2106.04560.
    "tiny": _vit(192, 12, 3, 768),
    "small": _vit(384, 12, 6, 1536),
    "base": _vit(768, 12, 12, 3072),
    "large": _vit(1024, 24, 16, 4096),
    "huge": _vit(1280, 32, 16, 5120),
    "giant": _vit(1408, 40, 16, 6144),
    "gigantic": _vit(1664, 48, 16, 8192),
    "deit_tiny": _deit(192, 3),
    "deit_small": _deit(384, 6),
    "deit_base": _deit(768, 12),
    "deit_tiny_distilled": _deit(192, 3, distillation_token=True),
    "deit_small_distilled": _deit(384, 6, distillation_token=True),
    "deit_base_distilled": _deit(768, 12, distillation_token=True),
    "deit3_small": _deit(384, 6, **_DEIT3),
    "deit3_medium": _deit(512, 8, **_DEIT3),
    "deit3_base": _deit(768, 12, **_DEIT3),
    "deit3_large": _deit(1024, 16, depth=24, **_DEIT3),
    "deit3_huge": _deit(1280, 16, depth=32, **_DEIT3),
}


def ViT(
    variant="base",
    *,
    image_size=224,
    patch_size=16,
    num_classes=1000,
    pool="class",
    num_registers=0,
    position="learned",
    position_grid=None,
    drop_path_rate=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    name=None,
    **overrides,
):
    """Vision Transformer classifier, in the global dtype policy; float32 logits.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
    https://arxiv.org/abs/2010.11929, and the sources of `VARIANTS`.

    Args:
        variant: Key of `VARIANTS`.
        image_size: Pixels: an int, `(height, width)`, or None for any size at run time
            (padded to whole patches, the position table resampled).
        patch_size: Side of a patch, in pixels; must divide a given `image_size`.
        num_classes: Number of logits; 0 returns the pooled, normalised features.
        pool: `"class"` (class token), `"mean"` (of the patch tokens; no class token) or
            `"attention"` (a learned probe; no class token).
        num_registers: Number of register tokens; they have no position.
        position: `"learned"` (the paper's table), `"sincos_1d"` or `"sincos_2d"`
            (`SinCosPosition`), `"relative"` (`RelativePositionBias`), `"rotary"`
            (`RotaryPosition`), `"learned_peg"` (the table, and `PEG` after the first
            block) or `"none"`.
        position_grid: `(h, w)` of a learned table; None for the grid of `image_size`,
            or of 224 pixels where that is None.
        drop_path_rate: Drop path of the last block; it grows linearly from 0, or is the
            same in every block (DeiT III).
        dropout: Rate after the position and in every block.
        attention_dropout: Rate on the attention weights.
        name: Name of the model.
        **overrides: Fields of the row (`Variant`), such as `depth=6`, `qk_norm=True`
            or `normalization=None`.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits
        `(B, num_classes)`, or to features `(B, D)` when `num_classes=0`, those of
        `pre_logits` where there is a `representation_size`. With a distillation token
        the logits are the mean of the nodes `head` and `head_dist`.

    Raises:
        ValueError: If the variant, the pooling, the position or an override is unknown,
            sizes do not divide, a distillation token meets another pooling than
            `"class"` or a `representation_size`, the width does not fit the position,
            or `labels` are not one for each class.
    """
    row = encoder.choose(ViT, VARIANTS, variant, overrides)
    if position not in POSITIONS:
        raise ValueError(encoder.unknown("position", position, POSITIONS))
    if row.distillation_token and row.representation_size is not None:
        raise ValueError(
            "representation_size must be None beside a distillation token, got "
            f"{row.representation_size}."
        )
    images, x = encoder.normalized_images(row, image_size)
    grid = PatchEmbedding(
        row.embed_dim,
        patch_size,
        row.initialization,
        use_bias=not row.pre_norm,
        name="patches",
    )(x)
    x, num_tokens, num_prefix = encoder.prefix_tokens(grid, row, pool, num_registers)
    if position in ("learned", "learned_peg"):
        if position_grid is None and None in images.shape[1:3]:
            position_grid = [(side or 224) // patch_size for side in images.shape[1:3]]
        x = LearnedPosition(
            num_prefix,
            num_tokens if row.class_position else 0,
            position_grid,
            row.initialization,
            row.resampling,
            name="position",
        )(x, grid)
    elif position in ("sincos_1d", "sincos_2d"):
        dimensions = 1 if position == "sincos_1d" else 2
        x = SinCosPosition(num_prefix, dimensions, name="position")(x, grid)
    if row.pre_norm:
        x = encoder.norm(row, "pre_norm")(x)
    peg = {"num_prefix": num_prefix, "initialization": row.initialization}
    x = encoder.blocks(
        encoder.dropout_layer(x, dropout),
        grid,
        row,
        drop_path_rate=drop_path_rate,
        dropout=dropout,
        attention_dropout=attention_dropout,
        position=position if position in ("relative", "rotary") else None,
        pegs={0: peg} if position == "learned_peg" else None,
    )
    x = encoder.classify(
        x,
        row,
        pool,
        num_prefix,
        num_classes,
        row.norm_after_pool,
        row.representation_size,
    )
    return keras.Model(images, x, name=name or f"vit_{variant}{patch_size}")
