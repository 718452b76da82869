"""The assembly that the plain vision transformers share.

Shapes in this file:
    B batch, h x w patch grid, N = h * w patch tokens, R prefix tokens, D embedding.
"""

import dataclasses
import difflib

import numpy as np
from keras import layers

from keras_vit.transformer import TransformerBlock


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
        constant_drop_path: Whether every block has the drop path of the last one.
        initialization: Key of `keras_vit.initialization.INITIALIZATIONS`.
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
    constant_drop_path: bool = False
    initialization: str = "jax"


def choose(variants, variant, overrides):
    """Return the row of `variants` called `variant`, with some fields replaced.

    Raises:
        ValueError: If there is no such row, or no such field.
    """
    if variant not in variants:
        raise ValueError(f"variant must be {_one_of(variant, variants)}")
    row = variants[variant]
    fields = [field.name for field in dataclasses.fields(row)]
    for name in overrides:
        if name not in fields:
            raise ValueError(f"An argument must be {_one_of(name, fields)}")
    return dataclasses.replace(row, **overrides)


def _one_of(name, names):
    known = ", ".join(repr(x) for x in names)
    nearest = difflib.get_close_matches(str(name), list(names), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"one of {known}, got {name!r}.{hint}"


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


def blocks(tokens, row, *, drop_path_rate=0.0, dropout=0.0, attention_dropout=0.0):
    """Stack the transformer blocks of `row` on `tokens`, named `block0`, `block1`, ...

    Args:
        tokens: Symbolic `(B, R + N, D)`.
        row: `Encoder`.
        drop_path_rate: Drop path of the last block; it grows linearly from 0, or is
            the same in all where the row says so.
        dropout: Rate of dropout in each block.
        attention_dropout: Rate of dropout on attention weights.

    Returns:
        Symbolic `(B, R + N, D)`.
    """
    start = drop_path_rate if row.constant_drop_path else 0.0
    rates = np.linspace(start, drop_path_rate, row.depth)
    for i, drop_path in enumerate(rates.tolist()):
        tokens = TransformerBlock(
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
            name=f"block{i}",
        )(tokens)
    return tokens


def norm(row, name="norm"):
    """The LayerNorm after the last block."""
    return layers.LayerNormalization(epsilon=row.epsilon, name=name)
