"""Weights of a model by timm's names, in both directions; what must be resampled.

Shapes in this file: D embedding, C channels, P patch side, k kernel side, h x w grid of
a position table, K prefix rows of it.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np
from keras import ops

from keras_vit.checkpoint_files import Tensor
from keras_vit.embedding import PatchEmbedding
from keras_vit.resampling import resample, resize_matrix

LAYERS = [  # our layer, timm's module
    (r"patches/convolution(\d)", r"patch_embed.conv\1"),
    (r"patches/norm(\d)", r"patch_embed.bn\1"),
    (r"patches/(?:project/)?project", r"patch_embed.proj"),
    (r"pre_norm", r"norm_pre"),
    (r"block(\d+)/norm(\d)", r"blocks.\1.norm\2"),
    (r"block(\d+)/attention/qkv", r"blocks.\1.attn.qkv"),
    (r"block(\d+)/attention/query_norm", r"blocks.\1.attn.q_norm"),
    (r"block(\d+)/attention/key_norm", r"blocks.\1.attn.k_norm"),
    (r"block(\d+)/attention/project", r"blocks.\1.attn.proj"),
    (r"block(\d+)/scale(\d)", r"blocks.\1.ls\2"),
    (r"block(\d+)/mlp/expand", r"blocks.\1.mlp.fc1"),
    (r"block(\d+)/mlp/reduce", r"blocks.\1.mlp.fc2"),
    (r"peg(\d+)", r"pos_block.\1.proj.0"),
    (r"norm", r"norm"),
    (r"pool/query", r"attn_pool.q"),
    (r"pool/key_value", r"attn_pool.kv"),
    (r"pool/project", r"attn_pool.proj"),
    (r"pool/norm", r"attn_pool.norm"),
    (r"pool/mlp/expand", r"attn_pool.mlp.fc1"),
    (r"pool/mlp/reduce", r"attn_pool.mlp.fc2"),
    (r"pre_logits", r"pre_logits.fc"),
    (r"head", r"head"),
    (r"head_dist", r"head_dist"),
    (r"token_head", r"aux_head"),
    (r"stage(\d)_patches/project", r"patch_embeds.\1.proj"),
    (r"stage(\d)_patches_norm", r"patch_embeds.\1.norm"),
    (r"stage(\d)_peg", r"pos_block.\1.proj.0"),
    (r"stage(\d)_block(\d+)/norm(\d)", r"blocks.\1.\2.norm\3"),
    (r"stage(\d)_block(\d+)/attention/query", r"blocks.\1.\2.attn.q"),
    (r"stage(\d)_block(\d+)/attention/key_value", r"blocks.\1.\2.attn.kv"),
    (r"stage(\d)_block(\d+)/attention/project", r"blocks.\1.\2.attn.proj"),
    (r"stage(\d)_block(\d+)/attention/reduce/project", r"blocks.\1.\2.attn.sr"),
    (r"stage(\d)_block(\d+)/attention/norm", r"blocks.\1.\2.attn.norm"),
    (r"stage(\d)_block(\d+)/mlp/expand", r"blocks.\1.\2.mlp.fc1"),
    (r"stage(\d)_block(\d+)/mlp/reduce", r"blocks.\1.\2.mlp.fc2"),
]
WEIGHTS = {  # our weight, theirs
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
SINGLE = {  # our weight, timm's
    "tokens/class_token": "cls_token",
    "tokens/distillation_token": "dist_token",
    "tokens/registers": "reg_token",
    "position/table": "pos_embed",
    "pool/probe": "attn_pool.latent",
}


_PARTS = [re.split(r"\\\d", theirs) for _, theirs in LAYERS] + [["fc_norm"]]
_MODULES = "|".join(r"\d+".join(map(re.escape, parts)) for parts in _PARTS)
_KNOWN = re.compile(rf"({_MODULES})\.({'|'.join(WEIGHTS.values())}|gamma)")


def is_known(name: str) -> bool:
    """Whether some model of ours has a place for a tensor of this name of timm's."""
    return name in SINGLE.values() or _KNOWN.fullmatch(name) is not None


@dataclasses.dataclass(frozen=True)
class Weight:
    """A variable of a model, and how it looks in PyTorch.

    Args:
        variable: Keras variable.
        name: timm's name; our path, where timm has no such weight.
        shape: Its shape in PyTorch.
        to_ours: PyTorch's array to ours.
        to_theirs: Ours to PyTorch's.
    """

    variable: object
    name: str
    shape: tuple[int, ...]
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def timm_name(path: str) -> str | None:
    """timm's name of our variable; None where timm has no such weight."""
    if path in SINGLE:
        return SINGLE[path]
    layer, _, weight = path.rpartition("/")
    for ours, theirs in LAYERS:
        match = re.fullmatch(ours, layer)
        if match and weight in WEIGHTS:
            weight = "gamma" if "/scale" in layer else WEIGHTS[weight]
            return f"{match.expand(theirs)}.{weight}"
    return None


def weights(model) -> list[Weight]:
    """Every variable of a model of `keras_vit` that a checkpoint holds."""
    patch_sizes = {
        id(layer.project.kernel): layer.patch_size
        for layer in model._flatten_layers()  # the public `layers` is not recursive
        if isinstance(layer, PatchEmbedding)
    }
    return [_weight(v, patch_sizes.get(id(v))) for v in model.weights]


def _weight(variable, patch):
    path, shape = variable.path, tuple(variable.shape)
    name = timm_name(path) or path

    def weight(shape, to_ours, to_theirs):
        return Weight(variable, name, shape, to_ours, to_theirs)

    if not path.endswith("/kernel") or name == path:
        return weight(shape, _same, _same)
    if patch is not None:  # (P P C, D) and (D, C, P, P)
        rows, dim = shape
        ours = (patch, patch, rows // patch**2, dim)
        return weight(
            (dim, ours[2], patch, patch),
            lambda x: x.transpose(2, 3, 1, 0).reshape(shape),
            lambda x: x.reshape(ours).transpose(3, 2, 0, 1),
        )
    if len(shape) == 2:  # (in, out) and (out, in)
        return weight(shape[::-1], np.transpose, np.transpose)
    if shape[-1] == 1:  # (k, k, C, 1) and (C, 1, k, k)
        theirs = (shape[2], 1, *shape[:2])
        turn = (2, 3, 0, 1)
        return weight(theirs, lambda x: x.transpose(turn), lambda x: x.transpose(turn))
    theirs = (shape[3], shape[2], *shape[:2])  # (k, k, C, D) and (D, C, k, k)
    return weight(
        theirs, lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
    )


def _same(x):
    return x


# --- a checkpoint's prefix tokens, table and patches, made those of the model


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Tensors that fit a model, and what was done to them: sentences."""

    tensors: dict[str, Tensor]
    notes: list[str]


def adapt(tensors, architecture, model) -> Adapted:
    """Make a checkpoint's prefix tokens, table and patch kernel those of `model`.

    A class or distillation token that nobody pools is a register of ours; a register's
    position is added to it, because both are constants.

    Args:
        tensors: By timm's names.
        architecture: What the file holds.
        model: Model of that architecture, perhaps of another size.
    """
    tensors, notes = dict(tensors), []
    names = {layer.name for layer in model.layers}
    if "fc_norm.weight" in tensors:
        for weight in ("weight", "bias"):
            if f"fc_norm.{weight}" in tensors:
                tensors[f"norm.{weight}"] = tensors.pop(f"fc_norm.{weight}")
    if "tokens" in names:
        _adapt_prefix(tensors, architecture, model, notes)
    if "pos_embed" in tensors and "position" in names:
        _adapt_table(tensors, architecture, model.get_layer("position"), notes)
    if "patch_embed.proj.weight" in tensors:
        _adapt_patches(tensors, model.get_layer("patches"), notes)
    return Adapted(tensors, notes)


def _adapt_prefix(tensors, architecture, model, notes):
    layer = model.get_layer("tokens")
    keep = {"cls_token": layer.class_token, "dist_token": layer.distillation_token}
    place, parts = 0, []  # of the tokens in the table
    for name in ("cls_token", "dist_token", "reg_token"):
        if name not in tensors:
            continue
        token = tensors[name]
        count = token.shape[1] if len(token.shape) == 3 else 1
        has_position = place + count <= architecture.table_prefix
        if not keep.get(name, False):
            if has_position and "pos_embed" in tensors:
                token = _plus(token, tensors["pos_embed"], place)
            parts.append(token)
            del tensors[name]
            if name != "reg_token":
                notes.append(f"{name} is a register: nothing is pooled from it")
        place += count
    if parts and layer.num_registers:
        shape = (1, sum(part.shape[1] for part in parts), parts[0].shape[-1])
        tensors["reg_token"] = Tensor(
            tuple(name for part in parts for name in part.names),
            shape,
            lambda: np.concatenate([part.read() for part in parts], axis=1),
        )
    elif parts:
        tensors["reg_token"] = parts[0]


def _plus(token, table, place):
    """A token and its row of the table."""
    count = token.shape[1]
    return Tensor(
        (*token.names, *table.names),
        token.shape,
        lambda: token.read() + table.read()[:, place : place + count],
    )


def _adapt_table(tensors, architecture, layer, notes):
    table, grid = tensors["pos_embed"], tuple(architecture.table_grid)
    old, new = architecture.table_prefix, layer.num_prefix_positions
    target = tuple(layer.stored_grid)

    def read():
        array = table.read()
        patches = resample(array[:, old:], grid, target, layer.resampling)
        return np.concatenate([array[:, :new], ops.convert_to_numpy(patches)], axis=1)

    if new > old:
        return  # the shapes will be refused
    rows = new + target[0] * target[1]
    tensors["pos_embed"] = Tensor(
        table.names, (table.shape[0], rows, table.shape[-1]), read
    )
    if grid != target:
        notes.append(
            f"position table resampled from {grid[0]} x {grid[1]} to "
            f"{target[0]} x {target[1]} ({layer.resampling})"
        )


def _adapt_patches(tensors, layer, notes):
    layer = layer if isinstance(layer, PatchEmbedding) else layer.project
    kernel, new = tensors["patch_embed.proj.weight"], layer.patch_size
    if len(kernel.shape) != 4 or kernel.shape[2] != kernel.shape[3]:
        return  # the shapes will be refused
    old = kernel.shape[2]
    if old == new:
        return
    tensors["patch_embed.proj.weight"] = kernel.map(
        lambda x: resample_patches(x, new), (*kernel.shape[:2], new, new)
    )
    notes.append(
        f"patch kernel resampled from {old} x {old} to {new} x {new} (pseudo-inverse)"
    )


def resample_patches(kernel: np.ndarray, side: int) -> np.ndarray:
    """Resample a patch embedding so that resized patches keep their tokens.

        W' = (B^T)^+ W B^+,   x' = B x B^T

    B is bilinear resizing of P pixels to P', so that <x', W'> = <x, W> for every patch
    x where P' >= P, and as nearly as possible where P' < P.

    Source: Beyer et al. 2023, "FlexiViT: One Model for All Patch Sizes", section 3.4,
    https://arxiv.org/abs/2212.08013.

    Args:
        kernel: `(D, C, P, P)`.
        side: P'.

    Returns:
        `(D, C, P', P')`, float32.
    """
    matrix = np.asarray(resize_matrix(side, kernel.shape[-1], "linear"), "float64")
    inverse = np.linalg.pinv(matrix.T)  # (P', P)
    return (inverse @ kernel.astype("float64") @ inverse.T).astype("float32")
