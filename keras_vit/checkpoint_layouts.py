"""Names of tensors: one table a published format, all of them to timm's names.

timm's are the common tongue, because DeiT, LV-ViT, Twins and CPVT use them too:

    cls_token, dist_token, reg_token, pos_embed, patch_embed.proj, norm_pre
    blocks.I.{norm1, attn.qkv, attn.q_norm, attn.k_norm, attn.proj, ls1,
              norm2, mlp.fc1, mlp.fc2, ls2}
    norm or fc_norm, attn_pool.{latent, q, kv, proj, norm, mlp}, pre_logits.fc,
    head, head_dist, aux_head (LV-ViT), pos_block.I.proj.0 (PEG),
    patch_embeds.S, blocks.S.I (Twins)

`recognize` renames, transposes and joins lazily; what it cannot name keeps its own
name, and is refused later.

Shapes in this file are PyTorch's: (out, in) of a linear layer, (out, in, P, P) of a
convolution. D embedding, H heads, d = D / H, P patch side, C channels.
"""

import dataclasses
import math
import re

import numpy as np

from keras_vit.checkpoint_files import Tensor, size_in_words

ANCHORS = {  # layout: the tensor that is found in every file of it
    "google": r"embedding/kernel",
    "hf": r"embeddings\.patch_embeddings\.projection\.weight",
    "timm": r"patch_embeds?\.(0\.)?proj\.weight",
}
LEFT_OUT = (  # of what lies inside a model
    (r"num_batches_tracked$", "a counter of the training"),
    (r"(^|\.)mask_token$", "for pre-training with masked patches"),
    (r"^decoder\.", "for pre-training with masked patches"),
    (r"^opt/(?!target/)", "state of the optimizer"),
)


@dataclasses.dataclass(frozen=True)
class Recognized:
    """Tensors under timm's names.

    Args:
        layout: `"google"`, `"hf"` or `"timm"`.
        tensors: By timm's names; those without one keep their own.
        num_heads: H, where the shapes tell it; else None.
        left_out: Reasons, by names in the file.
    """

    layout: str
    tensors: dict[str, Tensor]
    num_heads: int | None
    left_out: dict[str, str]


def recognize(tensors: dict[str, Tensor], location: str) -> Recognized:
    """Find the layout of a checkpoint and give its tensors timm's names.

    Raises:
        ValueError: If there is no vision transformer in it, or more than one.
    """
    found = [
        (layout, name[: match.start()])
        for layout, pattern in ANCHORS.items()
        for name, tensor in tensors.items()
        if len(tensor.shape) == 4
        and _why_left_out(name) is None
        and (match := re.search(rf"(?<![^./]){pattern}$", name))
    ]
    if not found:
        some = ", ".join(sorted(tensors)[:5]) or "none at all"
        raise ValueError(
            f"{location} must hold a vision transformer: embedding/kernel (Google), "
            "patch_embed.proj.weight (timm, DeiT, LV-ViT, CPVT), patch_embeds.0.proj."
            "weight (Twins) or embeddings.patch_embeddings.projection.weight (Hugging "
            f"Face). Its tensors are {some}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{location} must hold one model, got several, under "
            f"{', '.join(repr(prefix) for _, prefix in found)}; save one of them alone."
        )
    layout, prefix = found[0]
    inside, left_out = _inside(tensors, prefix)
    rename = {"google": _from_google, "hf": _from_hf, "timm": _from_timm}[layout]
    try:
        named, num_heads = rename(inside)
        joined = _joined(named)
    except ValueError as error:
        raise ValueError(f"{location}: {error}") from error
    if layout == "hf" and "head.weight" in named:
        for name in ("pre_logits.fc.weight", "pre_logits.fc.bias"):
            if name in joined:
                left_out[joined.pop(name).names[0]] = "the classifier does not use it"
    return Recognized(layout, joined, num_heads, left_out)


def _inside(tensors, prefix):
    """Tensors of the model without the prefix of their names, and why not the rest."""
    inside, left_out = {}, {}
    folder = prefix[: prefix.rfind("/") + 1]
    for name, tensor in tensors.items():
        reason = _why_left_out(name)
        if reason is not None:
            left_out[name] = reason
        elif name.startswith(folder):  # heads may stand beside `vit.`
            inside[name.removeprefix(folder).removeprefix(prefix[len(folder) :])] = (
                tensor
            )
        else:
            left_out[name] = f"stands outside of {folder!r}"
    return inside, left_out


def _why_left_out(name):
    return next((why for pattern, why in LEFT_OUT if re.search(pattern, name)), None)


def _renamed(tensors, table):
    """Rename by the first row whose pattern is the whole name."""
    named = {}
    for name, tensor in tensors.items():
        for pattern, new, how in table:
            match = re.fullmatch(pattern, name)
            if match:
                name, tensor = match.expand(new), how(tensor)
                break
        if name in named:
            raise ValueError(
                f"Two tensors mean {name}: {named[name].names[0]} and "
                f"{tensor.names[0]}; save one model alone."
            )
        named[name] = tensor
    return named


def _as_is(tensor):
    return tensor


# --- timm, DeiT, LV-ViT, Twins

_TIMM = [(r"blocks\.(\d+)\.gamma_(\d)", r"blocks.\1.ls\2.gamma", _as_is)]


def _from_timm(tensors):
    return _renamed(tensors, _TIMM), None


# --- Hugging Face: before and since transformers 5.23

_LAYER = r"(?:encoder\.layer|layers)\.(\d+)\."
_HF = [
    (r"embeddings\.cls_token", "cls_token", _as_is),
    (r"embeddings\.distillation_token", "dist_token", _as_is),
    (r"embeddings\.position_embeddings", "pos_embed", _as_is),
    (
        r"embeddings\.patch_embeddings\.projection\.(\w+)",
        r"patch_embed.proj.\1",
        _as_is,
    ),
    *(
        (rf"{_LAYER}{theirs}\.(weight|bias)", rf"blocks.\1.{ours}.\2", _as_is)
        for theirs, ours in (
            (r"layernorm_before", "norm1"),
            (r"attention\.(?:attention\.query|q_proj)", "attn.q"),
            (r"attention\.(?:attention\.key|k_proj)", "attn.k"),
            (r"attention\.(?:attention\.value|v_proj)", "attn.v"),
            (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
            (r"layernorm_after", "norm2"),
            (r"(?:intermediate\.dense|mlp\.fc1)", "mlp.fc1"),
            (r"(?:output\.dense|mlp\.fc2)", "mlp.fc2"),
        )
    ),
    (r"layernorm\.(\w+)", r"norm.\1", _as_is),
    (r"pooler\.dense\.(\w+)", r"pre_logits.fc.\1", _as_is),
    (r"(?:cls_)?classifier\.(\w+)", r"head.\1", _as_is),
    (r"distillation_classifier\.(\w+)", r"head_dist.\1", _as_is),
]


def _from_hf(tensors):
    return _renamed(tensors, _HF), None


# --- Google: vision_transformer (old and new Flax) and big_vision


def _transposed(tensor):
    """(in, out) to (out, in)."""
    _check_rank(tensor, 2)
    return tensor.map(np.transpose, tensor.shape[::-1])


def _convolution(tensor):
    """(P, P, C, D) to (D, C, P, P)."""
    _check_rank(tensor, 4)
    shape = (tensor.shape[3], tensor.shape[2], *tensor.shape[:2])
    return tensor.map(lambda x: x.transpose(3, 2, 0, 1), shape)


def _of_heads(tensor):
    """(D, H, d) to (D, D)."""
    _check_rank(tensor, 3)
    inside, outside = tensor.shape[0], math.prod(tensor.shape[1:])
    return tensor.map(lambda x: x.reshape(inside, outside).T, (outside, inside))


def _to_heads(tensor):
    """(H, d, D) to (D, D)."""
    _check_rank(tensor, 3)
    inside, outside = math.prod(tensor.shape[:2]), tensor.shape[2]
    return tensor.map(lambda x: x.reshape(inside, outside).T, (outside, inside))


def _flat(tensor):
    shape = (math.prod(tensor.shape),)
    return tensor.map(lambda x: x.reshape(shape), shape)


def _check_rank(tensor, rank):
    if len(tensor.shape) != rank:
        raise ValueError(
            f"The tensor {tensor.names[0]} must have {rank} dimensions, got shape "
            f"{tensor.shape}; the file is damaged, or of another model."
        )


def _google_attention(theirs, ours):
    """Rows of an attention; `ours` may hold the group of a block."""
    rows = [(rf"{theirs}/out/kernel", f"{ours}.proj.weight", _to_heads)]
    rows += [(rf"{theirs}/out/bias", f"{ours}.proj.bias", _as_is)]
    for letter in ("query", "key", "value"):
        short = f"{ours}.{letter[0]}"
        rows += [(rf"{theirs}/{letter}/kernel", f"{short}.weight", _of_heads)]
        rows += [(rf"{theirs}/{letter}/bias", f"{short}.bias", _flat)]
    return rows


def _google_dense(theirs, ours):
    return [
        (rf"{theirs}/kernel", f"{ours}.weight", _transposed),
        (rf"{theirs}/bias", f"{ours}.bias", _as_is),
    ]


def _google_norm(theirs, ours):
    return [
        (rf"{theirs}/scale", f"{ours}.weight", _as_is),
        (rf"{theirs}/bias", f"{ours}.bias", _as_is),
    ]


_BLOCK = r"Transformer/encoderblock_(\d+)/"
_GOOGLE = [
    (r"embedding/kernel", "patch_embed.proj.weight", _convolution),
    (r"embedding/bias", "patch_embed.proj.bias", _as_is),
    (r"cls", "cls_token", _as_is),
    (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed", _as_is),
    *_google_norm(_BLOCK + "LayerNorm_0", r"blocks.\1.norm1"),
    *_google_norm(_BLOCK + "LayerNorm_[12]", r"blocks.\1.norm2"),
    *_google_attention(
        _BLOCK + r"MultiHeadDotProductAttention_[01]", r"blocks.\1.attn"
    ),
    *_google_dense(_BLOCK + r"MlpBlock_[03]/Dense_0", r"blocks.\1.mlp.fc1"),
    *_google_dense(_BLOCK + r"MlpBlock_[03]/Dense_1", r"blocks.\1.mlp.fc2"),
    *_google_norm("Transformer/encoder_norm", "norm"),
    (r"MAPHead_0/probe", "attn_pool.latent", _as_is),
    *_google_attention("MAPHead_0/MultiHeadDotProductAttention_0", "attn_pool"),
    *_google_norm("MAPHead_0/LayerNorm_0", "attn_pool.norm"),
    *_google_dense("MAPHead_0/MlpBlock_0/Dense_0", "attn_pool.mlp.fc1"),
    *_google_dense("MAPHead_0/MlpBlock_0/Dense_1", "attn_pool.mlp.fc2"),
    *_google_dense("pre_logits", "pre_logits.fc"),
    *_google_dense("head", "head"),
]


def _from_google(tensors):
    tensors = _unscanned(tensors)
    query = next((x for n, x in tensors.items() if n.endswith("query/kernel")), None)
    if query is None:
        return _renamed(tensors, _GOOGLE), None
    _check_rank(query, 3)
    heads = query.shape[1:]  # (H, d)
    for name, tensor in tensors.items():
        if not (match := re.search(r"_\d+/(query|key|value|out)/(kernel|bias)$", name)):
            continue
        side = slice(2) if match[1] == "out" else slice(-2, None)
        if match[0].endswith("out/bias") or tensor.shape[side] == heads:
            continue
        raise ValueError(
            f"The tensor {tensor.names[0]} must be of {heads[0]} heads of width "
            f"{heads[1]}, got shape {tensor.shape}; the file is damaged."
        )
    return _renamed(tensors, _GOOGLE), heads[0]


def _unscanned(tensors):
    """Blocks that big_vision stacked along a first axis, one by one."""
    stacked, single = "Transformer/encoderblock/", {}
    for name, tensor in tensors.items():
        if not name.startswith(stacked):
            single[name] = tensor
            continue
        if not tensor.shape:
            _check_rank(tensor, 1)
        rest, read = name.removeprefix(stacked), _kept(tensor)
        for i in range(tensor.shape[0]):
            row = dataclasses.replace(tensor, read=read)
            row = row.map(lambda x, i=i: x[i], tensor.shape[1:])
            single[f"Transformer/encoderblock_{i}/{rest}"] = row
    return single


def _kept(tensor):
    """A reader that keeps the stack until its last block was read."""
    kept = {}

    def read():
        if not kept:
            kept.update(array=tensor.read(), left=tensor.shape[0])
        array = kept["array"]
        kept["left"] -= 1
        if not kept["left"]:
            kept.clear()
        return array

    return read


# --- queries, keys and values in one tensor


_WORDS = {"q": ("query", "q_proj"), "k": ("key", "k_proj"), "v": ("value", "v_proj")}


def _joined(tensors):
    """`attn.q`, `attn.k`, `attn.v` to `attn.qkv`; of a pooling, `k`, `v` to `kv`."""
    joined = dict(tensors)
    for name in tensors:
        match = re.fullmatch(
            r"(blocks\.\d+\.attn|attn_pool)\.([qkv])\.(weight|bias)", name
        )
        if not match or name not in joined or match[1] + match[2] == "attn_poolq":
            continue
        letters = "kv" if match[1] == "attn_pool" else "qkv"
        parts = [f"{match[1]}.{letter}.{match[3]}" for letter in letters]
        lost = [x for x in letters if f"{match[1]}.{x}.{match[3]}" not in tensors]
        if lost:
            here = wanted = tensors[name].names[0]
            for words in zip(_WORDS[match[2]], _WORDS[lost[0]], strict=True):
                wanted = wanted.replace(*words)
            raise ValueError(f"it has {here}, but lacks {wanted}; it is damaged.")
        new = f"{match[1]}.{letters}.{match[3]}"
        joined[new] = _concatenated([joined.pop(part) for part in parts])
    return joined


def _concatenated(parts):
    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or not parts[0].shape:
        raise ValueError(
            "Queries, keys and values must have one shape, got "
            + ", ".join(f"{part.names[0]} {part.shape}" for part in parts)
            + "; the file is damaged, or of another model."
        )
    shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
    names = tuple(name for part in parts for name in part.names)
    return Tensor(names, shape, lambda: np.concatenate([part.read() for part in parts]))


def describe_unknown(tensors) -> str:
    """The first names of tensors, for a message."""
    names = sorted(name for tensor in tensors for name in tensor.names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} ({size_in_words(tensors)} values)"
