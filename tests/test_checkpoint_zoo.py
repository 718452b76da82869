"""Every architecture of timm is loaded as timm builds it, or refused by a sentence.

Nothing is allocated: timm's models lie on torch's meta device, their files are holes
with a header, and our variables are not initialised.
"""

import collections
import gc
import importlib
import json
import re

import keras
import pytest
from peers import timm

from keras_vit import inspect_checkpoint
from keras_vit.embedding import NORMALIZATIONS

BEGINNINGS = ("vit_", "deit", "flexivit", "twins_pcpvt")
KINDS = {  # the first whose pattern is in the name; how many there are in timm 1.0.31
    "Twins-PCPVT": ("twins_pcpvt", 3),
    "FlexiViT": ("flexivit", 3),
    "DeiT III": ("deit3", 8),
    "DeiT": ("deit", 8),
    "DINOv2": ("dinov2", 6),
    "TIPSv2": ("tipsv2", 3),
    "CLIP": ("_clip_", 26),
    "SigLIP": ("siglip", 34),
    "registers, mean or attention pooling": (r"_gap_|_reg\d_|_map_", 25),
    "ViT": ("", 24),
}
REASONS = {  # of a refusal: the first whose pattern is in the sentence
    "rotary positions of another kind": r"are rotary|rope\.|attn\.(q_bias|k_proj)",
    "relative positions of another kind": r"rel_pos\.",
    "gated MLP": r"mlp\.fc1_g|gated MLP",
    "blocks of another kind": r"\.attns\.|in_norm|lambda_|after its branches",
    "convolutions before the patches": r"backbone\.|must hold a vision transformer",
    "no last norm": r"lacks .* norm\.weight",
}


def kind_of(name):
    return next(kind for kind, (x, _) in KINDS.items() if re.search(x, name))


# --- a checkpoint of holes


def write(model, folder):
    """The checkpoint that timm would write, with zeros that take no room."""
    hub = importlib.import_module("timm.models._hub")
    folder.mkdir(exist_ok=True)
    hub.save_config_for_hf(model, str(folder / "config.json"))
    header, end = {}, 0
    for name, x in model.state_dict().items():
        start, end = end, end + 4 * x.numel()
        header[name] = {"dtype": "F32", "shape": list(x.shape)}
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def inspect(folder):
    """`inspect_checkpoint` without a weight of ours."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            return inspect_checkpoint(folder)
    finally:
        keras.utils.clear_session()  # or Keras would initialise them after all


# --- what timm built

MODULES = {  # all of theirs that the equations of ours are
    "VisionTransformer": "VisionTransformer VisionTransformerDistilled PatchEmbed "
    "Block Attention Mlp LayerScale LayerNorm Linear Conv2d Dropout DropPath Identity "
    "Sequential GELU GELUTanh QuickGELU AttentionPoolLatent",
    "Twins": "Twins PatchEmbed PosConv Block GlobalSubSampleAttn Mlp LayerNorm Linear "
    "Conv2d Dropout DropPath Identity Sequential ModuleList GELU",
}
POOLS = {"token": "class", "avg": "mean", "map": "attention"}
GELUS = {"GELU": "exact", "GELUTanh": "tanh", "QuickGELU": "quick"}


def named(model, kind):
    """The submodules of a class."""
    return [x for x in model.modules() if type(x).__name__ == kind]


def only(values):
    """The one value of all."""
    values = set(values)
    assert len(values) == 1, values
    return values.pop()


def expected(model):
    """What `inspect_checkpoint` should say, from the attributes of timm's model."""
    family = "Twins" if type(model).__name__ == "Twins" else "VisionTransformer"
    strange = {type(x).__name__ for x in model.modules()} - set(MODULES[family].split())
    assert not strange, f"has {strange}, which were not looked at"
    config = model.pretrained_cfg
    squash = config.get("crop_mode") == "squash" and config["crop_pct"] == 1.0
    activations = [mlp.act for mlp in named(model, "Mlp")]
    assert {getattr(x, "approximate", "none") for x in activations} == {"none"}
    return {
        "normalization": (config["mean"], config["std"]),
        "crop_ratio": None if squash else config["crop_pct"],
        "interpolation": config["interpolation"],
        "num_classes": model.num_classes,
        "gelu": GELUS[only(type(x).__name__ for x in activations)],
        **(expected_pyramid if family == "Twins" else expected_vit)(model),
    }


def expected_vit(model):
    attentions, blocks = named(model, "Attention"), list(model.blocks)
    distilled = type(model).__name__ == "VisionTransformerDistilled"
    pool, tokens = POOLS[model.global_pool], model.num_prefix_tokens
    pooled = (1 + distilled) if pool == "class" else 0
    prefix = model.pos_embed.shape[1] - model.patch_embed.num_patches
    assert prefix == (0 if model.no_embed_class else tokens)
    assert not model.pool_include_prefix
    assert all(x.scale == x.head_dim**-0.5 for x in attentions)
    lost = (prefix - (pooled if prefix else 0)) * model.embed_dim  # added to registers
    return {
        "patch_size": only(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(blocks),
        "num_heads": only(
            x.num_heads for x in [*attentions, *named(model, "AttentionPoolLatent")]
        ),
        "hidden": only(x.out_features for x in (block.mlp.fc1 for block in blocks)),
        "qkv_bias": only(x.qkv.bias is not None for x in attentions),
        "qk_norm": only(type(x.q_norm).__name__ for x in attentions) == "LayerNorm",
        "layer_scale": bool(named(model, "LayerScale")),
        "epsilon": only(x.eps for x in named(model, "LayerNorm")),
        "pool": pool,
        "norm_after_pool": type(model.fc_norm).__name__ == "LayerNorm",
        "pre_norm": type(model.norm_pre).__name__ == "LayerNorm",
        "num_registers": tokens - pooled,
        "distillation_token": distilled,
        "class_position": prefix > 0,
        "position": "learned",
        "representation_size": None,
        "residual_scale": 1.0,
        "resampling": "bicubic_antialias",
        "image_size": tuple(model.patch_embed.img_size),
        "table_grid": tuple(model.patch_embed.grid_size),
        "parameters": sum(x.numel() for x in model.parameters()) - lost,
    }


def expected_pyramid(model):
    first = [stage[0] for stage in model.blocks]
    reductions = [getattr(block.attn, "sr", None) for block in first]
    last = {*named(model, "LayerNorm")} - {x.norm for x in model.patch_embeds}
    reduced = {x.norm for x in named(model, "GlobalSubSampleAttn") if x.norm}
    return {
        "embed_dims": tuple(model.embed_dims),
        "depths": tuple(model.depths),
        "num_heads": tuple(block.attn.num_heads for block in first),
        "mlp_ratios": tuple(
            block.mlp.fc1.out_features / dim
            for block, dim in zip(first, model.embed_dims, strict=True)
        ),
        "sr_ratios": tuple(1 if x is None else x.stride[0] for x in reductions),
        "peg": True,
        "qkv_bias": True,
        "epsilon": only(x.eps for x in last - reduced),
        "reduction_epsilon": only(x.eps for x in reduced),
        "image_size": tuple(model.pretrained_cfg["input_size"][1:]),
        "table_grid": None,
        "parameters": sum(x.numel() for x in model.parameters()),
    }


def found(report):
    """The same of a report."""
    values = {**report.arguments, "table_grid": report.table_grid}
    values["parameters"] = report.parameters
    normalization = values["normalization"]
    values["normalization"] = NORMALIZATIONS.get(normalization, normalization)
    if "layer_scale" in values:
        values["layer_scale"] = values["layer_scale"] is not None
        values["hidden"] = values["embed_dim"] * values["mlp_ratio"]
    return values


def differences(model, report):
    """Names whose values are not those of timm's model: (found, expected)."""
    have, want = found(report), expected(model)
    tensors = len(model.state_dict()) - len(report.left_out)
    different = {x: (have[x], want[x]) for x in want if have[x] != want[x]}
    if report.fresh or report.left_out or report.used != tensors:
        different["tensors"] = report.fresh, report.left_out, report.used, tensors
    return different


# --- all of them


@pytest.fixture(scope="module")
def nothing_drawn():
    """More than half of the time: timm draws weights that are not there, slowly."""
    timm()
    gc.freeze()  # and `clear_session` looks for garbage in all that was imported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.layers.weight_init._trunc_normal_", lambda x, *_: x)
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory, nothing_drawn):
    """Reports, sentences of refusal, and differences, by timm's names."""
    library, torch = timm(), pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("zoo")
    loaded, refused, different = {}, {}, {}
    for name in library.list_models():
        if not name.startswith(BEGINNINGS):
            continue
        with torch.device("meta"):
            model = library.create_model(name)
        try:
            loaded[name] = inspect(write(model, folder))
        except ValueError as error:
            refused[name] = str(error)
            continue
        try:
            different[name] = differences(model, loaded[name])
        except AssertionError as error:
            different[name] = str(error)
    (folder / "model.safetensors").unlink()
    return loaded, refused, {name: x for name, x in different.items() if x}


@pytest.mark.slow
def test_every_loaded_architecture_is_that_of_timm(zoo):
    """384 pixels are 27.4 patches: timm leaves 6 pixels out, ours takes 378."""
    names = ("vit_so400m_patch14_siglip_384", "vit_so400m_patch14_siglip_gap_384")
    assert zoo[2] == {x: {"image_size": ((378, 378), (384, 384))} for x in names}


@pytest.mark.slow
def test_no_architecture_is_lost(zoo):
    counts = collections.Counter(map(kind_of, zoo[0]))
    print(len(zoo[0]), counts)
    assert {kind: counts[kind] for kind in KINDS if counts[kind] < KINDS[kind][1]} == {}


@pytest.mark.slow
def test_all_others_are_refused_by_one_sentence(zoo):
    reasons = {}
    for name, sentence in zoo[1].items():
        assert sentence.endswith(".") and "\n" not in sentence
        found = [why for why, x in REASONS.items() if re.search(x, sentence)]
        reasons.setdefault((*found, "other")[0], []).append(name)
    print(len(zoo[1]), {why: len(names) for why, names in reasons.items()})
    assert "other" not in reasons, reasons["other"]
