"""LV-ViT: a vision transformer in which every token has a label to learn.

LV-ViT: "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
https://arxiv.org/abs/2104.10858. The training is `training.token_labeling`.
"""

import dataclasses

import keras

from keras_vit import encoder
from keras_vit.embedding import FeatureMap
from keras_vit.head import TokenMax, TokenPool
from keras_vit.position import LearnedPosition
from keras_vit.stem import ConvStem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant(encoder.Encoder):
    """A row of `VARIANTS`: the fields of `Encoder`, and

    Args:
        stem_width: Channels of the convolutions of the stem.
        resampling: How the position table is resampled, as in `LearnedPosition`.
    """

    stem_width: int = 64
    resampling: str = "bicubic"


def _lvvit(embed_dim, depth, num_heads, residual_scale, crop_ratio, **fields):
    return Variant(
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=3.0,
        qkv_bias=False,
        epsilon=1e-5,
        residual_scale=residual_scale,
        initialization="deit",
        normalization="imagenet",
        crop_ratio=crop_ratio,
        interpolation="bicubic",
        **fields,
    )


VARIANTS = {  # models/lvvit.py of the paper's code
    "tiny": _lvvit(240, 12, 4, 1.0, 0.9),
    "small": _lvvit(384, 16, 6, 2.0, 0.9),
    "medium": _lvvit(512, 20, 8, 2.0, 1.0),
    "large": _lvvit(768, 24, 12, 3.0, 1.0, stem_width=128),
}


def LVViT(
    variant="small",
    *,
    image_size=224,
    patch_size=16,
    num_classes=1000,
    token_weight=0.5,
    position_grid=None,
    drop_path_rate=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    name=None,
    **overrides,
):
    """LV-ViT classifier: a convolutional stem, a class head and a token head.

        logits = head(class token) + token_weight * max over tokens of token_head(token)

    The token head is meant to be trained by `training.TokenLabeling`. Where it is not,
    pass `token_weight=0`: a fresh head would only add noise, and is left out.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858, and its code.

    Args:
        variant: Key of `VARIANTS`.
        image_size: Pixels: an int, `(height, width)`, or None for any size at run time
            (padded to whole patches, the position table resampled).
        patch_size: Side of a patch, in pixels; even, and must divide a given
            `image_size`.
        num_classes: Number of logits; 0 returns the normalised class token.
        token_weight: Weight of the token head in the logits, >= 0; 0.5 in the paper's
            code; 0 for a model without a token head.
        position_grid: `(h, w)` of the position table; None for the grid of
            `image_size`, or of 224 pixels where that is None.
        drop_path_rate: Drop path of the last block; it grows linearly from 0. The
            paper's code trains with 0.1, 0.1, 0.2 and 0.3.
        dropout: Rate after the position and in every block.
        attention_dropout: Rate on the attention weights.
        name: Name of the model.
        **overrides: Fields of the row (`Variant`), such as `depth=6`, `stem_width=32`
            or `residual_scale=1.0`.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits
        `(B, num_classes)`, or to features `(B, D)` when `num_classes=0`. The node
        `head` has the logits of the class token, `token_head` those of each patch,
        `(B, h, w, num_classes)`.

    Raises:
        ValueError: If the variant or an override is unknown, sizes do not divide,
            `patch_size` is odd, `token_weight` is negative, a distillation token is
            asked for, or `labels` are not one for each class.
    """
    row = encoder.choose(LVViT, VARIANTS, variant, overrides)
    if token_weight < 0:
        raise ValueError(f"token_weight must be >= 0, got {token_weight}.")
    if row.distillation_token:
        raise ValueError("LV-ViT has no distillation token; ViT and CPVT may have one.")
    images, x = encoder.normalized_images(row, image_size)
    grid = ConvStem(
        row.embed_dim, patch_size, row.stem_width, row.initialization, name="patches"
    )(x)
    x, num_tokens, num_prefix = encoder.prefix_tokens(grid, row, "class", 0)
    if position_grid is None and None in images.shape[1:3]:
        position_grid = [(side or 224) // patch_size for side in images.shape[1:3]]
    x = LearnedPosition(
        num_prefix,
        num_tokens,
        position_grid,
        row.initialization,
        row.resampling,
        name="position",
    )(x, grid)
    x = encoder.blocks(
        encoder.dropout_layer(x, dropout),
        grid,
        row,
        drop_path_rate=drop_path_rate,
        dropout=dropout,
        attention_dropout=attention_dropout,
    )
    x = encoder.norm(row)(x)
    y = TokenPool(0, name="pool")(x)
    y = encoder.head(y, row, num_classes)
    if num_classes and token_weight:
        x = FeatureMap(num_prefix, name="patch_tokens")(x, grid)
        x = encoder.head(x, row, num_classes, "token_head")
        y = TokenMax(token_weight, dtype="float32", name="logits")(y, x)
    return keras.Model(images, y, name=name or f"lvvit_{variant}{patch_size}")
