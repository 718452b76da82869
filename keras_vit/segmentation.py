"""Dense prediction: feature maps of any model, and a class for every pixel.

Simple feature pyramid: "Exploring Plain Vision Transformer Backbones for Object
Detection", https://arxiv.org/abs/2203.16527. Semantic FPN: "Panoptic Feature Pyramid
Networks", https://arxiv.org/abs/1901.02446.

Shapes in this file:
    B batch, H x W pixels, h x w grid of a map, D channels, C classes.
"""

import math
import re

import keras
from keras import layers, ops

from keras_vit.embedding import FeatureMap
from keras_vit.normalization import LayerNormalization
from keras_vit.resampling import resize

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class Upsample(layers.Layer):
    """Enlarge a map bilinearly, then cut off what was padding.

    Args:
        factor: How many times larger a side.

    Call arguments:
        grid: `(B, h, w, D)`.
        like: `(B, h', w', _)`, h' <= factor h, w' <= factor w; only its shape is used.

    Returns:
        `(B, h', w', D)`.
    """

    def __init__(self, factor=2, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def compute_output_shape(self, grid_shape, like_shape):
        return (*like_shape[:3], grid_shape[-1])

    def call(self, grid, like):
        height, width = ops.shape(grid)[1:3]
        x = resize(grid, (height * self.factor, width * self.factor), "linear")
        height, width = ops.shape(like)[1:3]
        return x[:, :height, :width]


def feature_pyramid(backbone):
    """Cut four feature maps out of a model of this package, the finest first.

    Of a pyramid (`PCPVT`) these are its stages, with strides of 4, 8, 16, 32 pixels. A
    plain model has one map, of its last block; new transposed convolutions make maps
    of strides P/4 and P/2 of it, P being the side of a patch, and a pooling one of
    stride 2 P.

    Source: Li et al. 2022, "Exploring Plain Vision Transformer Backbones for Object
    Detection", section 3, https://arxiv.org/abs/2203.16527.

    Args:
        backbone: Model of `ViT`, `CPVT` or `PCPVT`; what follows the last block, the
            head included, is left out.

    Returns:
        `keras.Model`: raw images `(B, H, W, 3)` to four maps `(B, h, w, D)`, not
        normalised; h is H over the stride, rounded up, or more in a plain model of
        any size.

    Raises:
        ValueError: If the model has no such nodes, or P is not a multiple of 4.
    """
    maps, _ = _maps(backbone)
    return keras.Model(backbone.input, maps, name=f"{backbone.name}_pyramid")


def _maps(backbone):
    """The four symbolic maps of a model, and the stride of the first in pixels."""
    names = [layer.name for layer in backbone.layers]
    if "stage0" in names:
        maps = [backbone.get_layer(f"stage{i}").output for i in range(4)]
        return maps, backbone.get_layer("stage0_patches").patch_size
    last = [name for name in names if re.fullmatch(r"(block|peg)\d+", name)]
    if not last or not {"patches", "tokens"} <= set(names):
        raise ValueError(
            "The backbone must be a model of keras_vit, with nodes 'patches', 'tokens' "
            f"and 'block0', or 'stage0' to 'stage3'; got {backbone.name!r}."
        )
    patch_size = backbone.get_layer("patches").patch_size
    if patch_size % 4:
        raise ValueError(
            "patch_size must be a multiple of 4, so that there are finer maps, got "
            f"{patch_size}."
        )
    num_prefix = sum(w.shape[1] for w in backbone.get_layer("tokens").prefix)
    grid = backbone.get_layer("patches").output
    x = FeatureMap(num_prefix, name="feature_map")(
        backbone.get_layer(last[-1]).output, grid
    )
    dim = x.shape[-1]
    half = _transposed(dim // 2, "half")(x)
    quarter = _transposed(dim // 2, "quarter_1")(x)
    quarter = LayerNormalization(epsilon=1e-6, name="quarter_norm")(quarter)
    quarter = layers.Activation("gelu", name="quarter_gelu")(quarter)
    quarter = _transposed(dim // 4, "quarter_2")(quarter)
    double = layers.MaxPooling2D(2, padding="same", name="double")(x)
    return [quarter, half, x, double], patch_size // 4


def _transposed(channels, name):
    return layers.Conv2DTranspose(channels, 2, 2, name=f"pyramid_{name}")


def SemanticFPN(backbone, num_classes, *, channels=128, name=None):
    """A class for every pixel, from the feature maps of any model; float32 logits.

    Each map passes a LayerNorm and a 1 x 1 convolution and receives the coarser one,
    enlarged; each result is brought to the finest grid by 3 x 3 convolutions, group
    normalisations, ReLUs and enlargements by 2; their sum is classified and enlarged
    to the image.

    Source: Kirillov et al. 2019, "Panoptic Feature Pyramid Networks", section 3,
    https://arxiv.org/abs/1901.02446.
    Differs from the source in the LayerNorm, because the maps of a transformer are not
    normalised, and in that the pyramid is as wide as the head.

    Args:
        backbone: Model of `ViT`, `CPVT` or `PCPVT`; its own head is left out.
        num_classes: C.
        channels: Width of the pyramid and the head.
        name: Name of the model.

    Returns:
        `keras.Model`: raw images `(B, H, W, 3)` of 0..255 to logits `(B, H, W, C)`;
        any size where the backbone takes any.

    Raises:
        ValueError: If the model has no feature maps (`feature_pyramid`), or
            `num_classes` is not positive.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}.")
    maps, stride = _maps(backbone)
    finer, fused = None, [None] * len(maps)
    for i in reversed(range(len(maps))):
        x = LayerNormalization(epsilon=1e-6, name=f"fpn{i}_norm")(maps[i])
        x = layers.Conv2D(channels, 1, name=f"fpn{i}_lateral")(x)
        if finer is not None:
            up = Upsample(2, name=f"fpn{i}_up")(finer, x)
            x = layers.Add(name=f"fpn{i}_add")([x, up])
        finer = x
        fused[i] = _convolution(channels, f"fpn{i}_output")(x)
    finest = [_to_finest(fused, i, channels) for i in range(len(fused))]
    x = layers.Add(name="sum")(finest)
    x = layers.Conv2D(num_classes, 1, dtype="float32", name="head")(x)
    logits = Upsample(stride, dtype="float32", name="logits")(x, backbone.input)
    return keras.Model(
        backbone.input, logits, name=name or f"semantic_fpn_{backbone.name}"
    )


def _to_finest(fused, level, channels):
    """Bring the map of one level to the finest grid, twice as fine at each step."""
    x = fused[level]
    for step in reversed(range(max(level, 1))):
        prefix = f"head{level}_{step}"
        x = _convolution(channels, f"{prefix}_conv")(x)
        groups = math.gcd(32, channels)
        x = layers.GroupNormalization(groups, name=f"{prefix}_norm")(x)
        x = layers.ReLU(name=f"{prefix}_relu")(x)
        if level:
            x = Upsample(2, name=f"{prefix}_up")(x, fused[step])
    return x


def _convolution(channels, name):
    return layers.Conv2D(
        channels, 3, padding="same", kernel_initializer="he_normal", name=name
    )
