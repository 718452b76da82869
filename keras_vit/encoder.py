"""The assembly that the plain vision transformers share.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, D embedding.
"""

import dataclasses
import difflib
import inspect

import keras
import numpy as np
from keras import layers

from keras_vit.embedding import PixelNormalization, PrefixTokens
from keras_vit.head import AttentionPool, Classifier, MeanPool, TokenPool
from keras_vit.initialization import initializer
from keras_vit.normalization import LayerNormalization
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
        gelu: `"exact"`, `"tanh"` or `"quick"`.
        epsilon: Added to the variance by every LayerNorm.
        residual_scale: Divisor of both branches of every block.
        constant_drop_path: Whether every block has the drop path of the last one.
        initialization: Key of `keras_vit.initialization.INITIALIZATIONS`.
        head_bias: Start value of the bias of the head: -ln of the number of classes for
            a loss of sigmoids, which then starts where a softmax does.
        distillation_token: Whether there is a distillation token with its own head.
        normalization: Pixel normalisation: `"inception"`, `"imagenet"`, `"clip"`, a
            pair (mean, standard deviation) of one's own, or None.
        crop_ratio: Record for who feeds the model, as in `PixelNormalization`.
        interpolation: Likewise.
        labels: Names of the classes, in the order of the logits; None where nobody
            knows them. They travel in the model's file.
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
    head_bias: float = 0.0
    distillation_token: bool = False
    normalization: str | tuple | None = "inception"
    crop_ratio: float | None = None
    interpolation: str = "bilinear"
    labels: tuple[str, ...] | None = None


def choose(model, variants, variant, overrides):
    """Return the row of `variants` called `variant`, with some fields replaced.

    Args:
        model: Function of the model; the names of its arguments are known too, so that
            one of them misspelt is recognised.
        variants: Rows by name.
        variant: Name of a row.
        overrides: Values by the name of a field.

    Raises:
        ValueError: If there is no such row, or no such field.
    """
    if variant not in variants:
        raise ValueError(unknown("variant", variant, variants))
    row = variants[variant]
    fields = [field.name for field in dataclasses.fields(row)]
    arguments = inspect.signature(model).parameters.values()
    own = [x.name for x in arguments if x.kind is not x.VAR_KEYWORD]
    for name in overrides:
        if name not in fields:
            raise ValueError(unknown("An argument", name, [*own, *fields]))
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
    """The LayerNorm after the last block, or at another place of that name."""
    return LayerNormalization(epsilon=row.epsilon, name=name)


def classify(
    tokens,
    row,
    pool,
    num_prefix,
    num_classes,
    norm_after_pool=False,
    representation_size=None,
):
    """Final LayerNorm, pooling and classifier: `(B, num_classes)` or `(B, D)`.

    With a distillation token: the mean of the nodes `head` and `head_dist`.

    Args:
        tokens: Symbolic `(B, R + N, D)`.
        row: `Encoder`.
        pool: One of `POOLS`.
        num_prefix: R, number of tokens before the patches.
        num_classes: Number of logits; 0 for the features.
        norm_after_pool: Whether the mean is normalised, not the tokens.
        representation_size: Width of a Dense and a tanh between pooling and head; None
            for neither. Not for a distillation token.

    Raises:
        ValueError: If the labels of the row are not one for each class.
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
    if representation_size is not None:
        pooled = [representation(pooled[0], row, representation_size)]
    names = ("head", "head_dist")
    pooled = [
        head(x, row, num_classes, name) for x, name in zip(pooled, names, strict=False)
    ]
    if len(pooled) == 1:
        return pooled[0]
    name = "logits" if num_classes else "features"
    return layers.Average(dtype="float32" if num_classes else None, name=name)(pooled)


def representation(x, row, size):
    """A Dense and a tanh before the head, the node `pre_logits`."""
    return layers.Dense(
        size,
        activation="tanh",
        kernel_initializer=initializer(row.initialization, "representation_kernel"),
        name="pre_logits",
    )(x)


def head(x, row, num_classes, name="head"):
    """The classifier, a Dense of float32 logits; `num_classes=0` leaves the features.

    Raises:
        ValueError: If the labels of the row are not one for each class.
    """
    if num_classes:
        return Classifier(
            num_classes,
            labels=row.labels,
            kernel_initializer=initializer(row.initialization, "head_kernel"),
            bias_initializer=keras.initializers.Constant(row.head_bias),
            dtype="float32",
            name=name,
        )(x)
    if row.labels is not None:
        raise ValueError(
            f"labels must be None for num_classes=0, got {row.labels!r:.80}."
        )
    return x
