"""What a built model is: the arguments that would build it again.

A plain functional model has no other record of them than its layers.
"""

import json
import re

from keras_vit.embedding import PixelNormalization
from keras_vit.head import AttentionPool, MeanPool, class_labels
from keras_vit.position import LearnedPosition, SinCosPosition
from keras_vit.stem import ConvStem

NODES = (  # names of the layers of our classifiers
    r"images|normalize|patches|tokens|position|dropout|pre_norm|norm|pool|pool_dist|"
    r"pre_logits|head|head_dist|logits|features|patch_tokens|token_head|"
    r"block\d+|peg\d+|peg_before|stage\d(_\w+)?"
)


def describe(model) -> dict:
    """Family, arguments and table of a built model: plain values for JSON.

    Raises:
        ValueError: If it is not a classifier of `keras_vit`.
    """
    layers = {layer.name: layer for layer in model.layers}
    strange = [name for name in layers if not re.fullmatch(NODES, name)]
    pixels = layers.get("normalize")
    if strange or not isinstance(pixels, PixelNormalization):
        raise ValueError(
            "The model must be one that ViT, CPVT, LVViT or PCPVT of keras_vit returns"
            + (f", got one with the layer {strange[0]!r}." if strange else ".")
        )
    head, size = layers.get("head"), model.input_shape[1:3]
    arguments = {
        "image_size": None if size == (None, None) else size,
        "num_classes": 0 if head is None else head.units,
        "labels": class_labels(model),
        "normalization": pixels.normalization,
        "crop_ratio": pixels.crop_ratio,
        "interpolation": pixels.interpolation,
    }
    if "stage0_block0" in layers:
        family, found = "PCPVT", _pyramid(layers)
    elif isinstance(layers["patches"], ConvStem):
        family, found = "LVViT", {**_blocks(layers), **_lvvit(layers)}
    elif "position" not in layers and any(x.startswith("peg") for x in layers):
        family, found = "CPVT", {**_blocks(layers), **_cpvt(layers)}
    else:
        family, found = "ViT", {**_blocks(layers), **_vit(layers)}
    position = layers.get("position")
    grid = position.stored_grid if isinstance(position, LearnedPosition) else None
    if grid is not None and None in size:
        found["position_grid"] = grid
    description = {
        "family": family,
        "arguments": {**arguments, **found},
        "table_grid": grid,
        "table_prefix": 0 if grid is None else position.num_prefix_positions,
    }
    return json.loads(json.dumps(description))


def _blocks(layers):
    """Arguments that all plain transformers have."""
    names = [name for name in layers if re.fullmatch(r"block\d+", name)]
    block = layers["block0"]
    attention, scale = block.attention, block.scale1
    return {
        "variant": "base",
        "patch_size": layers["patches"].patch_size,
        "embed_dim": layers["patches"].compute_output_shape((1, 64, 64, 3))[-1],
        "depth": len(names),
        "num_heads": attention.num_heads,
        "mlp_ratio": block.mlp.mlp_ratio,
        "qkv_bias": attention.qkv_bias,
        "qk_norm": attention.qk_norm,
        "layer_scale": None if scale is None else scale.initial_value,
        "gelu": block.mlp.gelu,
        "epsilon": block.norm1.epsilon,
        "residual_scale": block.residual_scale,
        "initialization": attention.initialization,
    }


def _tokens(layers):
    pool = layers["pool"]
    kinds = {AttentionPool: "attention", MeanPool: "mean"}
    return {
        "pool": kinds.get(type(pool), "class"),
        "num_registers": layers["tokens"].num_registers,
        "distillation_token": layers["tokens"].distillation_token,
    }


def _vit(layers):
    position, attention = layers.get("position"), layers["block0"].attention
    pre_logits = layers.get("pre_logits")
    found = {
        **_tokens(layers),
        "norm_after_pool": len(layers["norm"].output.shape) == 2,
        "pre_norm": "pre_norm" in layers,
        "representation_size": None if pre_logits is None else pre_logits.units,
    }
    if isinstance(position, LearnedPosition):
        found["position"] = "learned_peg" if "peg0" in layers else "learned"
        found["class_position"] = position.num_prefix_positions > 0
        found["resampling"] = position.resampling
    elif isinstance(position, SinCosPosition):
        found["position"] = f"sincos_{position.dimensions}d"
    elif attention.bias is not None or attention.rotary is not None:
        found["position"] = "rotary" if attention.bias is None else "relative"
    else:
        found["position"] = "none"
    return found


def _cpvt(layers):
    pegs = [name for name in layers if name.startswith("peg")]
    first = layers[pegs[0]]
    return {
        **_tokens(layers),
        "variant": "base",
        "peg_positions": [
            -1 if name == "peg_before" else int(name.removeprefix("peg"))
            for name in pegs
        ],
        "peg_kernel_size": first.kernel_size,
        "peg_padding": first.padding,
    }


def _lvvit(layers):
    logits = layers.get("logits")
    return {
        "variant": "small",
        "stem_width": layers["patches"].width,
        "token_weight": 0 if logits is None else logits.weight,
        "resampling": layers["position"].resampling,
    }


def _pyramid(layers):
    blocks = [
        [x for x in layers if re.fullmatch(rf"stage{stage}_block\d+", x)]
        for stage in range(4)
    ]
    first = [layers[names[0]] for names in blocks]
    return {
        "variant": "small",
        "embed_dims": [layers[f"stage{s}_patches"].embed_dim for s in range(4)],
        "depths": [len(names) for names in blocks],
        "num_heads": [block.attention.num_heads for block in first],
        "mlp_ratios": [block.mlp.mlp_ratio for block in first],
        "sr_ratios": [block.sr_ratio for block in first],
        "peg": "stage0_peg" in layers,
        "qkv_bias": first[0].attention.qkv_bias,
        "gelu": first[0].mlp.gelu,
        "epsilon": first[0].norm1.epsilon,
        "reduction_epsilon": first[0].reduction_epsilon,
        "initialization": first[0].attention.initialization,
    }
