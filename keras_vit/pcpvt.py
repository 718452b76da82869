"""PCPVT: the pyramid with conditional positions, of the Twins paper.

Twins-PCPVT: "Twins: Revisiting the Design of Spatial Attention in Vision
Transformers", https://arxiv.org/abs/2104.13840.
"""

import dataclasses
import itertools

import keras
import numpy as np
from keras import layers

from keras_vit import encoder
from keras_vit.embedding import FeatureMap, PatchEmbedding, PrefixTokens
from keras_vit.head import MeanPool
from keras_vit.normalization import LayerNormalization
from keras_vit.position import PEG
from keras_vit.transformer import PyramidBlock

PATCH_SIZES = (4, 2, 2, 2)  # strides 4, 8, 16, 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of `VARIANTS`; a tuple has one entry for each of the four stages.

    Args:
        embed_dims: Width of a token.
        depths: Number of blocks.
        num_heads: Number of attention heads; must divide the width.
        mlp_ratios: Hidden width of the MLP, as a multiple of the token's.
        sr_ratios: How many times smaller a side the grid of keys and values is.
        peg: Whether a PEG follows the first block of each stage.
        qkv_bias: Whether queries, keys and values have a bias.
        gelu: `"exact"`, `"tanh"` or `"quick"`.
        epsilon: Added to the variance by the LayerNorms of blocks and the last one.
        reduction_epsilon: Added by those after a reduction of the grid.
        initialization: Key of `keras_vit.initialization.INITIALIZATIONS`.
        head_bias: Start value of the bias of the head.
        normalization: Pixel normalisation: `"inception"`, `"imagenet"`, `"clip"`, a
            pair (mean, standard deviation) of one's own, or None.
        crop_ratio: Record for who feeds the model, as in `PixelNormalization`.
        interpolation: Likewise.
        labels: Names of the classes, in the order of the logits; None where nobody
            knows them. They travel in the model's file.
    """

    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    depths: tuple[int, ...]
    num_heads: tuple[int, ...] = (1, 2, 5, 8)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    peg: bool = True
    qkv_bias: bool = True
    gelu: str = "exact"
    epsilon: float = 1e-6
    reduction_epsilon: float = 1e-5
    initialization: str = "twins"
    head_bias: float = 0.0
    normalization: str | tuple | None = "imagenet"
    crop_ratio: float | None = 0.875
    interpolation: str = "bicubic"
    labels: tuple[str, ...] | None = None

    def __post_init__(self):
        for field in ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios"):
            value = getattr(self, field)
            if not isinstance(value, tuple | list) or len(value) != len(PATCH_SIZES):
                raise ValueError(
                    f"{field} must have one value for each of the {len(PATCH_SIZES)} "
                    f"stages, such as (3, 4, 6, 3), got {value!r}."
                )


VARIANTS = {  # Table 1 of Twins
    "small": Variant(depths=(3, 4, 6, 3)),
    "base": Variant(depths=(3, 4, 18, 3)),
    "large": Variant(depths=(3, 8, 27, 3)),
}


def PCPVT(
    variant="small",
    *,
    image_size=None,
    num_classes=1000,
    drop_path_rate=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    name=None,
    **overrides,
):
    """Twins-PCPVT classifier: PVT with PEG and mean pooling; float32 logits.

    The nodes `stage0` to `stage3` are the feature maps `(B, h, w, D)` of strides 4, 8,
    16 and 32, not normalised, for a detector's neck or `SemanticFPN`:

        maps = [model.get_layer(f"stage{i}").output for i in range(4)]
        backbone = keras.Model(model.input, maps)

    Source: Chu et al. 2021, "Twins: Revisiting the Design of Spatial Attention in
    Vision Transformers", section 3.1, https://arxiv.org/abs/2104.13840.
    Differs from the source in that sizes which do not divide are never cropped.

    Args:
        variant: Key of `VARIANTS`.
        image_size: Pixels: an int or `(height, width)`, multiples of 32; or None for
            any size at run time, each grid padded with zeros on the right and at the
            bottom.
        num_classes: Number of logits; 0 returns the pooled, normalised features.
        drop_path_rate: Drop path of the last block; it grows linearly from 0.
        dropout: Rate before each stage and in every block.
        attention_dropout: Rate on the attention weights.
        name: Name of the model.
        **overrides: Fields of the row (`Variant`), such as `depths=(1, 1, 2, 1)` or
            `peg=False`.

    Returns:
        `keras.Model`: raw images `(B, height, width, 3)` of 0..255 to logits
        `(B, num_classes)`, or to features `(B, D)` when `num_classes=0`.

    Raises:
        ValueError: If the variant or an override is unknown, a tuple has not four
            entries, `image_size` is not a multiple of 32, or `labels` are not one for
            each class.
    """
    row = encoder.choose(PCPVT, VARIANTS, variant, overrides)
    images, x = encoder.normalized_images(row, image_size)
    stride = int(np.prod(PATCH_SIZES))
    if any(side is not None and side % stride for side in images.shape[1:3]):
        nearest = [
            side and max(1, round(side / stride)) * stride for side in images.shape[1:3]
        ]
        raise ValueError(
            f"image_size must be a multiple of {stride}, such as {tuple(nearest)}, or "
            f"None for any size, got {tuple(images.shape[1:3])}."
        )
    rates = iter(np.linspace(0.0, drop_path_rate, sum(row.depths)).tolist())
    for stage in range(len(PATCH_SIZES)):
        x = _stage(
            x,
            row,
            stage,
            drop_path=list(itertools.islice(rates, row.depths[stage])),
            dropout=dropout,
            attention_dropout=attention_dropout,
        )
    x = PrefixTokens(class_token=False, name="tokens")(x)
    x = MeanPool(name="pool")(encoder.norm(row)(x))
    x = encoder.head(x, row, num_classes)
    return keras.Model(images, x, name=name or f"pcpvt_{variant}")


def _stage(x, row, stage, drop_path, dropout, attention_dropout):
    """Patches, blocks with a PEG after the first, and the map of one stage."""
    name = f"stage{stage}"
    grid = PatchEmbedding(
        row.embed_dims[stage],
        PATCH_SIZES[stage],
        row.initialization,
        name=f"{name}_patches",
    )(x)
    x = PrefixTokens(class_token=False, name=f"{name}_tokens")(grid)
    x = LayerNormalization(epsilon=row.reduction_epsilon, name=f"{name}_patches_norm")(
        x
    )
    if dropout:
        x = layers.Dropout(
            dropout, noise_shape=(None, None, None), name=f"{name}_dropout"
        )(x)
    for i in range(row.depths[stage]):
        x = PyramidBlock(
            row.num_heads[stage],
            row.sr_ratios[stage],
            row.mlp_ratios[stage],
            row.qkv_bias,
            row.gelu,
            dropout,
            attention_dropout,
            drop_path[i],
            row.epsilon,
            row.reduction_epsilon,
            row.initialization,
            name=f"{name}_block{i}",
        )(x, grid)
        if i == 0 and row.peg:
            peg = PEG(initialization=row.initialization, name=f"{name}_peg")
            x = peg(x, grid)
    return FeatureMap(name=name)(x, grid)
