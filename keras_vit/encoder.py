"""The assembly that the plain vision transformers share.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, D embedding.
"""

import dataclasses
import difflib

import keras
import numpy as np
from keras import layers

from keras_vit.embedding import PixelNormalization, PrefixTokens
from keras_vit.head import AttentionPool, MeanPool, TokenPool
from keras_vit.initialization import initializer
from keras_vit.position import PEG
from keras_vit.transformer import TransformerBlock

POOLS = ("class", "mean", "attention")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """What a row of a model's `VARIANTS` says of its blocks.

    Args:
        embed_dim: D, width of a token.
        depth: Number of blocks.
        num_heads: Number of attention heads; must divide D.
        mlp_ratio: Hidden width of the MLP, as a multiple of D.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normalised.
        layer_scale: Start value of LayerScale; None for none.
        gelu: `"exact"` or `"tanh"`.
        epsilon: Added to the variance by every LayerNorm.
        residual_scale: Divisor of both branches of every block.
        constant_drop_path: Whether every block has the drop path of the last one.
        initialization: Key of `keras_vit.initialization.INITIALIZATIONS`.
        distillation_token: Whether there is a distillation token with its own head.
        normalization: Pixel normalisation: `"inception"`, `"imagenet"` or None.
        crop_ratio: Record for who feeds the model, as in `PixelNormalization`.
        interpolation: Likewise.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    gelu: str = "exact"
    epsilon: float = 1e-6
    residual_scale: float = 1.0
    constant_drop_path: bool = False
    initialization: str = "jax"
    distillation_token: bool = False
    normalization: str | None = "inception"
    crop_ratio: float | None = None
    interpolation: str = "bilinear"


def choose(variants, variant, overrides):
    """Return the row of `variants` called `variant`, with some fields replaced.

    Raises:
        ValueError: If there is no such row, or no such field.
    """
    if variant not in variants:
        raise ValueError(unknown("variant", variant, variants))
    row = variants[variant]
    fields = [field.name for field in dataclasses.fields(row)]
    for name in overrides:
        if name not in fields:
            raise ValueError(unknown("An argument", name, fields))
    return dataclasses.replace(row, **overrides)


def unknown(what, name, known):
    """Sentence for a name that is not one of `known`, with the nearest that is."""
    nearest = difflib.get_close_matches(str(name), map(str, known), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(repr(x) for x in known)
    return f"{what} must be one of {listed}, got {name!r}.{hint}"


def size_pair(size):
    """`(height, width)` of an `image_size`: an int, a pair, or None for any size.

    Raises:
        ValueError: If it is none of these.
    """
    sides = (size, size) if size is None or isinstance(size, int) else tuple(size)
    positive = all(
        side is None or (isinstance(side, int) and side > 0) for side in sides
    )
    if len(sides) != 2 or not positive:
        raise ValueError(
            "image_size must be a positive int, a pair (height, width) or None, "
            f"got {size!r}."
        )
    return sides


def normalized_images(row, image_size):
    """The input of a model and its normalised pixels, both `(B, H, W, 3)`.

    Args:
        row: Row of a `VARIANTS`.
        image_size: Int, pair, or None for any size; the record of the preprocessing
            says 224 pixels then.
    """
    height, width = size_pair(image_size)
    images = keras.Input((height, width, 3), name="images")
    x = PixelNormalization(
        row.normalization,
        [side or 224 for side in (height, width)],
        row.crop_ratio,
        row.interpolation,
        dtype="float32",  # bfloat16 would round the pixels
        name="normalize",
    )(images)
    return images, x


def prefix_tokens(grid, row, pool, num_registers):
    """Tokens behind those that pooling and row ask for.

    Returns:
        Symbolic `(B, R + N, D)`; the number of class and distillation tokens; R.

    Raises:
        ValueError: If `pool` is unknown, or a distillation token meets another pooling
            than `"class"`.
    """
    if pool not in POOLS:
        raise ValueError(unknown("pool", pool, POOLS))
    if row.distillation_token and pool != "class":
        raise ValueError(f"A distillation token needs pool='class', got {pool!r}.")
    tokens = PrefixTokens(
        pool == "class",
        row.distillation_token,
        num_registers,
        row.initialization,
        name="tokens",
    )(grid)
    num_tokens = (1 + row.distillation_token) if pool == "class" else 0
    return tokens, num_tokens, num_tokens + num_registers


def dropout_layer(tokens, rate):
    """Dropout after the position, where there is any."""
    if not rate:
        return tokens
    return layers.Dropout(rate, noise_shape=(None,) * 3, name="dropout")(tokens)


def blocks(
    tokens,
    grid,
    row,
    *,
    drop_path_rate=0.0,
    dropout=0.0,
    attention_dropout=0.0,
    position=None,
    pegs=None,
):
    """Stack the transformer blocks of `row` on `tokens`, named `block0`, `block1`, ...

    Args:
        tokens: Symbolic `(B, R + N, D)`.
        grid: Symbolic `(B, h, w, D)`, for what needs geometry.
        row: `Encoder`.
        drop_path_rate: Drop path of the last block; it grows linearly from 0, or is
            the same in all where the row says so.
        dropout: Rate of dropout in each block.
        attention_dropout: Rate of dropout on attention weights.
        position: `"relative"`, `"rotary"` or None: what each attention knows.
        pegs: Keyword arguments of `PEG`, by the index of the block that it follows; -1
            for before the first.

    Returns:
        Symbolic `(B, R + N, D)`.

    Raises:
        ValueError: If there is no block of such an index.
    """
    pegs = pegs or {}
    wrong = [i for i in pegs if i not in range(-1, row.depth)]
    if wrong:
        raise ValueError(
            f"peg_positions must be in -1..{row.depth - 1}, the last block, got "
            f"{', '.join(map(repr, wrong))}."
        )
    start = drop_path_rate if row.constant_drop_path else 0.0
    rates = np.linspace(start, drop_path_rate, row.depth)
    if -1 in pegs:
        tokens = PEG(**pegs[-1], name="peg_before")(tokens, grid)
    for i, drop_path in enumerate(rates.tolist()):
        block = TransformerBlock(
            row.num_heads,
            mlp_ratio=row.mlp_ratio,
            qkv_bias=row.qkv_bias,
            qk_norm=row.qk_norm,
            layer_scale=row.layer_scale,
            gelu=row.gelu,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path,
            epsilon=row.epsilon,
            initialization=row.initialization,
            position=position,
            residual_scale=row.residual_scale,
            name=f"block{i}",
        )
        tokens = block(tokens) if position is None else block(tokens, grid)
        if i in pegs:
            tokens = PEG(**pegs[i], name=f"peg{i}")(tokens, grid)
    return tokens


def norm(row, name="norm"):
    """The LayerNorm after the last block."""
    return layers.LayerNormalization(epsilon=row.epsilon, name=name)


def classify(tokens, row, pool, num_prefix, num_classes, norm_after_pool=False):
    """Final LayerNorm, pooling and classifier: `(B, num_classes)` or `(B, D)`.

    With a distillation token: the mean of the nodes `head` and `head_dist`.

    Args:
        tokens: Symbolic `(B, R + N, D)`.
        row: `Encoder`.
        pool: One of `POOLS`.
        num_prefix: R, number of tokens before the patches.
        num_classes: Number of logits; 0 for the features.
        norm_after_pool: Whether the mean is normalised, not the tokens.
    """
    norm_after_pool = norm_after_pool and pool == "mean"
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
            head(num_classes, row, name)(x)
            for name, x in zip(names, pooled, strict=False)
        ]
    if len(pooled) == 1:
        return pooled[0]
    name = "logits" if num_classes else "features"
    return layers.Average(dtype="float32" if num_classes else None, name=name)(pooled)


def head(num_classes, row, name="head"):
    """The classifier: a Dense of float32 logits."""
    return layers.Dense(
        num_classes,
        kernel_initializer=initializer(row.initialization, "head_kernel"),
        dtype="float32",
        name=name,
    )
