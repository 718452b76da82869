"""The way back: our models as checkpoints that timm and transformers load."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
from keras import ops

from keras_vit.checkpoint_describe import describe
from keras_vit.checkpoint_files import CheckpointFile, Tensor, write_safetensors
from keras_vit.checkpoint_weights import weights
from keras_vit.embedding import NORMALIZATIONS

LAYOUTS = ("timm", "hf")


def to_checkpoint(model, path, layout="timm"):
    """Write a model's weights for timm or transformers, exactly.

    timm loads `ViT` (learned position or none) and `PCPVT`, transformers a `ViT` with
    a class token; without a classifier its pooler is fresh there, unless told
    `add_pooling_layer=False`. In timm's names every model of this package is written;
    those that timm lacks, `CPVT`, `LVViT` and other positions, `from_checkpoint` reads.
    The file also holds a description of the model and a SHA-256 of both, so that
    `from_checkpoint` needs nothing else and refuses a damaged copy.

    Args:
        model: A model of `keras_vit`.
        path: A file `NAME.safetensors`; or a folder, which also gets the `config.json`
            of the layout, for `timm.create_model("local-dir:PATH")` or
            `from_pretrained(PATH)`.
        layout: `"timm"` or `"hf"` (transformers).

    Raises:
        ValueError: If the layout is unknown, or has no place for the model.
        ImportError: If safetensors is not installed.
    """
    if layout not in LAYOUTS:
        raise ValueError(
            f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}."
        )
    description = describe(model)
    arrays = {
        weight.name: np.ascontiguousarray(weight.to_theirs(_numpy(weight.variable)))
        for weight in weights(model)
    }
    if layout == "hf":
        arrays = _for_hf(arrays, description)
    else:
        arrays = _for_timm(arrays, description)
    path = Path(path)
    if path.suffix == ".safetensors":
        write_safetensors(path, arrays, description)
        return
    configs = _hf_configs(description) if layout == "hf" else _timm_configs(description)
    path.mkdir(parents=True, exist_ok=True)
    for name, content in configs.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_safetensors(path / "model.safetensors", arrays, description)


def as_checkpoint(model, location: str) -> CheckpointFile:
    """A model as the checkpoint of itself, to be built anew with other arguments.

    Raises:
        ValueError: If it is not a classifier of `keras_vit`.
    """
    tensors = {
        weight.name: Tensor(
            (weight.variable.path,),
            weight.shape,
            lambda weight=weight: weight.to_theirs(_numpy(weight.variable)),
        )
        for weight in weights(model)
    }
    return CheckpointFile(location, "keras", tensors, description=describe(model))


def _numpy(variable):
    return np.asarray(ops.convert_to_numpy(variable.value), "float32")


# --- timm


def _for_timm(arrays, description):
    """Arrays as timm's own models name and cut them."""
    arguments = description["arguments"]
    if arguments.get("norm_after_pool"):
        for weight in ("weight", "bias"):
            arrays[f"fc_norm.{weight}"] = arrays.pop(f"norm.{weight}")
    registers = arguments.get("num_registers", 0)
    prefix = description["table_prefix"]
    distilled = arguments.get("distillation_token") and "pos_embed" in arrays
    if registers and prefix:  # timm's table has their rows too
        _insert_zeros(arrays, description, registers)
    elif distilled and not prefix:  # and always those of both tokens
        _insert_zeros(arrays, description, 2)
    return arrays


def _insert_zeros(arrays, description, rows):
    """Rows of the table for prefix tokens that have no position."""
    table, prefix = arrays["pos_embed"], description["table_prefix"]
    zeros = np.zeros((1, rows, table.shape[-1]), "float32")
    parts = [table[:, :prefix], zeros, table[:, prefix:]]
    arrays["pos_embed"] = np.concatenate(parts, axis=1)
    description["table_prefix"] = prefix + rows


def _timm_configs(description):
    """`config.json` for the models that timm has, with a warning where it differs."""
    family, found = description["family"], description["arguments"]
    position = found.get("position", "learned")
    if family not in ("ViT", "PCPVT") or position not in ("learned", "none"):
        return {}
    if family == "PCPVT":
        names = ("embed_dims", "depths", "num_heads", "mlp_ratios", "sr_ratios")
        architecture = "twins_pcpvt_small"
        arguments = {name: found[name] for name in names}
    else:
        distilled = found["distillation_token"]
        architecture = "deit_base_distilled_patch16_224"
        if not distilled:
            architecture = "vit_base_patch16_224"
        arguments = _timm_arguments(description)
    if found["epsilon"] != 1e-6:
        warnings.warn(
            f"timm builds this model with epsilon=1e-6, it has {found['epsilon']}; "
            "its answers will differ slightly there, from_checkpoint's will not.",
            stacklevel=3,
        )
    height, width = _config_size(found)
    mean, deviation = _mean_deviation(found["normalization"])
    data = {
        "input_size": [3, height, width],
        "fixed_input_size": family == "ViT",
        "interpolation": found["interpolation"],
        "crop_pct": found["crop_ratio"] or 1.0,
        "crop_mode": "center" if found["crop_ratio"] else "squash",
        "mean": mean,
        "std": deviation,
        "num_classes": found["num_classes"],
        "first_conv": "patch_embeds.0.proj"
        if family == "PCPVT"
        else "patch_embed.proj",
        "classifier": ["head", "head_dist"]
        if found.get("distillation_token")
        else "head",
    }
    config = {
        "architecture": architecture,
        "num_classes": found["num_classes"],
        "model_args": {**arguments, "img_size": [height, width]},
        "pretrained_cfg": data,
    }
    if found["labels"]:
        config["label_names"] = found["labels"]
    return {"config.json": config}


def _timm_arguments(description):
    found = description["arguments"]
    pools = {"class": "token", "mean": "avg", "attention": "map"}
    gelu = {"exact": "gelu", "tanh": "gelu_tanh", "quick": "quick_gelu"}
    lacks = {
        "representation_size": found["representation_size"] is not None,
        "residual_scale": found["residual_scale"] != 1,
        "registers beside a distillation token": found["distillation_token"]
        and found["num_registers"] > 0,
    }
    for name, lacking in lacks.items():
        if lacking:
            raise ValueError(
                f"timm has no model with {name}; written to a file NAME.safetensors, "
                "from_checkpoint reads it."
            )
    arguments = {
        "patch_size": found["patch_size"],
        "embed_dim": found["embed_dim"],
        "depth": found["depth"],
        "num_heads": found["num_heads"],
        "mlp_ratio": found["mlp_ratio"],
        "qkv_bias": found["qkv_bias"],
        "act_layer": gelu[found["gelu"]],
        "global_pool": pools[found["pool"]],
        "class_token": found["pool"] == "class",
        "no_embed_class": not description["table_prefix"],
        "pos_embed": "none" if found["position"] == "none" else "learn",
        "reg_tokens": found["num_registers"],
        "qk_norm": found["qk_norm"],
        "init_values": found["layer_scale"],
        "pre_norm": found["pre_norm"],
        "fc_norm": found["norm_after_pool"],
    }
    if found["distillation_token"]:
        for name in ("class_token", "no_embed_class", "global_pool", "fc_norm"):
            arguments.pop(name)
    return arguments


def _config_size(found):
    size = found["image_size"] or (224, 224)
    return [side or 224 for side in size]


def _mean_deviation(normalization):
    if normalization is None:  # of pixels in 0..1
        return [0.0] * 3, [1 / 255] * 3
    if isinstance(normalization, str):
        normalization = NORMALIZATIONS[normalization]
    return [list(numbers) for numbers in normalization]


# --- transformers


def _for_hf(arrays, description):
    """Arrays under the names of `ViTForImageClassification` and its like."""
    found = description["arguments"]
    lacks = {
        "family": ("ViT",),
        "pool": ("class",),
        "position": ("learned",),
        "num_registers": (0,),
        "layer_scale": (None,),
        "qk_norm": (False,),
        "pre_norm": (False,),
        "residual_scale": (1, 1.0),
    }
    have = {"family": description["family"], **found}
    for name, values in lacks.items():
        if have.get(name, values[0]) not in values:
            raise ValueError(
                f"transformers' ViT has {name}={values[0]!r}, this model has "
                f"{have[name]!r}; layout='timm' takes it."
            )
    distilled, classes = found["distillation_token"], found["num_classes"]
    if classes and found["representation_size"] is not None:
        raise ValueError(
            "transformers' ViT has no representation_size before a classifier; "
            "layout='timm' takes it as a .safetensors file."
        )
    if not description["table_prefix"]:  # theirs has a row for each prefix token
        _insert_zeros(arrays, description, 1 + distilled)
    base = ("deit." if distilled else "vit.") if classes else ""
    return _hf_names(arrays, base, distilled)


def _hf_names(arrays: dict, base: str, distilled: bool) -> dict:
    """Arrays under timm's names to those of Hugging Face's `save_pretrained`.

    Args:
        arrays: By timm's names.
        base: `"vit."` or `"deit."`; empty for a model without a classifier.
        distilled: Whether there are two classifiers.
    """
    table = [
        (r"cls_token", rf"{base}embeddings.cls_token"),
        (r"dist_token", rf"{base}embeddings.distillation_token"),
        (r"pos_embed", rf"{base}embeddings.position_embeddings"),
        (
            r"patch_embed\.proj\.(\w+)",
            rf"{base}embeddings.patch_embeddings.projection.\1",
        ),
        (r"norm\.(\w+)", rf"{base}layernorm.\1"),
        (r"pre_logits\.fc\.(\w+)", rf"{base}pooler.dense.\1"),
        (r"head\.(\w+)", r"cls_classifier.\1" if distilled else r"classifier.\1"),
        (r"head_dist\.(\w+)", r"distillation_classifier.\1"),
    ]
    layer = rf"{base}encoder.layer.\1."
    table += [
        (rf"blocks\.(\d+)\.{theirs}\.(\w+)", rf"{layer}{ours}.\2")
        for theirs, ours in (
            ("norm1", "layernorm_before"),
            (r"attn\.q", "attention.attention.query"),
            (r"attn\.k", "attention.attention.key"),
            (r"attn\.v", "attention.attention.value"),
            (r"attn\.proj", "attention.output.dense"),
            ("norm2", "layernorm_after"),
            (r"mlp\.fc1", "intermediate.dense"),
            (r"mlp\.fc2", "output.dense"),
        )
    ]
    renamed = {}
    for name, array in _split(arrays).items():
        rows = [(m, new) for x, new in table if (m := re.fullmatch(x, name))]
        if not rows:
            raise ValueError(f"Hugging Face's layout has no place for {name}.")
        match, new = rows[0]
        renamed[match.expand(new)] = array
    return renamed


def _split(arrays):
    split = {}
    for name, array in arrays.items():
        if ".attn.qkv." not in name:
            split[name] = array
            continue
        for letter, part in zip("qkv", np.split(array, 3), strict=True):
            split[name.replace(".qkv.", f".{letter}.")] = np.ascontiguousarray(part)
    return split


def _hf_configs(description):
    found = description["arguments"]
    distilled, classes = found["distillation_token"], found["num_classes"]
    kind = "DeiT" if distilled else "ViT"
    ending = "Model" if not classes else "ForImageClassification"
    ending += "WithTeacher" if distilled and classes else ""
    size = _config_size(found)
    mean, deviation = _mean_deviation(found["normalization"])
    labels = found["labels"] or [f"LABEL_{i}" for i in range(classes)]
    gelu = {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}
    config = {
        "architectures": [f"{kind}{ending}"],
        "model_type": kind.lower(),
        "hidden_size": found["embed_dim"],
        "num_hidden_layers": found["depth"],
        "num_attention_heads": found["num_heads"],
        "intermediate_size": round(found["embed_dim"] * found["mlp_ratio"]),
        "hidden_act": gelu[found["gelu"]],
        "layer_norm_eps": found["epsilon"],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": found["patch_size"],
        "num_channels": 3,
        "qkv_bias": found["qkv_bias"],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if found["representation_size"] is not None:
        config["pooler_output_size"] = found["representation_size"]
        config["pooler_act"] = "tanh"
    ratio = found["crop_ratio"]
    sides = {"height": size[0], "width": size[1]}
    preprocessor = {
        "image_processor_type": "DeiTImageProcessor" if ratio else "ViTImageProcessor",
        "do_resize": True,
        "size": {k: round(x / (ratio or 1)) for k, x in sides.items()},
        "resample": 3 if found["interpolation"] == "bicubic" else 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": deviation,
    }
    if ratio:
        preprocessor |= {"do_center_crop": True, "crop_size": sides}
    return {"config.json": config, "preprocessor_config.json": preprocessor}
