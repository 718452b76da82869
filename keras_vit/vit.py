"""ViT, with DeiT and DeiT III as rows of `VARIANTS`.

ViT: "An Image is Worth 16x16 Words", https://arxiv.org/abs/2010.11929.
DeiT: "Training data-efficient image transformers & distillation through attention",
https://arxiv.org/abs/2012.12877. DeiT III: "Revenge of the ViT",
https://arxiv.org/abs/2204.07118.
"""

import dataclasses

import keras
from keras import layers

from keras_vit.embedding import PatchEmbedding, PixelNormalization, PrefixTokens
from keras_vit.encoder import Encoder, blocks, choose, norm, size_pair
from keras_vit.head import AttentionPool, MeanPool, TokenPool
from keras_vit.initialization import initializer
from keras_vit.position import LearnedPosition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(Encoder):
    """A row of `VARIANTS`: the fields of `Encoder`, and

    Args:
        distillation_token: Whether there is a distillation token with its own head.
        class_position: Whether class and distillation token have a position.
        norm_after_pool: Whether `pool="mean"` normalises after the mean, not before.
        normalization: Pixel normalisation: `"inception"`, `"imagenet"` or None.
        crop_ratio: Record for who feeds the model, as in `PixelNormalization`.
        interpolation: Likewise.
    """

    distillation_token: bool = False
    class_position: bool = True
    norm_after_pool: bool = False
    normalization: str | None = "inception"
    crop_ratio: float | None = None
    interpolation: str = "bilinear"


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
        position_grid: `(h, w)` of the position table; None for the grid of
            `image_size`, or of 224 pixels where that is None.
        drop_path_rate: Drop path of the last block; it grows linearly from 0, or is the
            same in every block (DeiT III).
        dropout: Rate after the position and in every block.
        attention_dropout: Rate on the attention weights.
        name: Name of the model.
        **overrides: Fields of the row (`Variant`), such as `depth=6`, `qk_norm=True`
            or `normalization=None`.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits
        `(B, num_classes)`, or to features `(B, D)` when `num_classes=0`. With a
        distillation token the logits are the mean of the nodes `head` and `head_dist`.

    Raises:
        ValueError: If the variant, the pooling or an override is unknown, sizes do not
            divide, or a distillation token meets another pooling than `"class"`.
    """
    row = choose(VARIANTS, variant, overrides)
    height, width = size_pair(image_size)
    if pool not in ("class", "mean", "attention"):
        raise ValueError(f"pool must be 'class', 'mean' or 'attention', got {pool!r}.")
    if row.distillation_token and pool != "class":
        raise ValueError(f"A distillation token needs pool='class', got {pool!r}.")
    num_tokens = (1 + row.distillation_token) if pool == "class" else 0
    num_prefix = num_tokens + num_registers
    if position_grid is None and None in (height, width):
        position_grid = [(side or 224) // patch_size for side in (height, width)]

    images = keras.Input((height, width, 3), name="images")
    x = PixelNormalization(
        row.normalization,
        [side or 224 for side in (height, width)],
        row.crop_ratio,
        row.interpolation,
        dtype="float32",  # bfloat16 would round the pixels
        name="normalize",
    )(images)
    grid = PatchEmbedding(
        row.embed_dim, patch_size, row.initialization, name="patches"
    )(x)
    x = PrefixTokens(
        pool == "class",
        row.distillation_token,
        num_registers,
        row.initialization,
        name="tokens",
    )(grid)
    x = LearnedPosition(
        num_prefix,
        num_tokens if row.class_position else 0,
        position_grid,
        row.initialization,
        name="position",
    )(x, grid)
    if dropout:
        x = layers.Dropout(dropout, noise_shape=(None,) * 3, name="dropout")(x)
    x = blocks(
        x,
        row,
        drop_path_rate=drop_path_rate,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    x = _head(x, row, pool, num_prefix, num_classes)
    return keras.Model(images, x, name=name or f"vit_{variant}{patch_size}")


def _head(tokens, row, pool, num_prefix, num_classes):
    """Final LayerNorm, pooling and classifier: `(B, num_classes)` or `(B, D)`."""
    norm_after_pool = pool == "mean" and row.norm_after_pool
    x = tokens if norm_after_pool else norm(row)(tokens)
    if pool == "class":
        pooled = [TokenPool(0, name="pool")(x)]
    elif pool == "mean":
        pooled = [MeanPool(num_prefix, name="pool")(x)]
    else:
        pooled = [
            AttentionPool(
                row.num_heads,
                num_prefix,
                row.mlp_ratio,
                row.gelu,
                row.epsilon,
                row.initialization,
                name="pool",
            )(x)
        ]
    if norm_after_pool:
        pooled = [norm(row)(pooled[0])]
    if row.distillation_token:
        pooled.append(TokenPool(1, name="pool_dist")(x))
    if num_classes:
        names = ("head", "head_dist")
        pooled = [
            layers.Dense(
                num_classes,
                kernel_initializer=initializer(row.initialization, "head_kernel"),
                dtype="float32",
                name=name,
            )(x)
            for name, x in zip(names, pooled, strict=False)
        ]
    if len(pooled) == 1:
        return pooled[0]
    name = "logits" if num_classes else "features"
    return layers.Average(dtype="float32" if num_classes else None, name=name)(pooled)
