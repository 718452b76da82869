"""What shapes cannot tell: `config.json` of timm and Hugging Face, and what is usual.

`facts` returns arguments of our models: `num_heads`, `epsilon`, `gelu`, `pool`,
`image_size`, `normalization`, `crop_ratio`, `interpolation`, `labels`.
"""

import re

from keras_vit import vit
from keras_vit.embedding import NORMALIZATIONS

# Heads of every published model of these widths: timm 1.0's entry points of
# `VisionTransformer`, big_vision's table. {(D, hidden width of the MLP): heads}
NUM_HEADS = {
    (192, 768): 3,
    (256, 1024): 4,
    (256, 1280): 4,
    (320, 1792): 5,
    (384, 1536): 6,
    (512, 2048): 8,
    (640, 2560): 10,
    (768, 3072): 12,
    (832, 2176): 13,
    (896, 2304): 14,
    (896, 3584): 14,
    (1024, 4096): 16,
    (1152, 4304): 16,
    (1280, 5120): 16,
    (1408, 6144): 16,
    (1536, 6144): 16,
    (1664, 8192): 16,
}

ASK = {
    "num_heads": "the number of attention heads{sizes}",
    "residual_scale": "the divisor of LV-ViT's branches: 1.0 for tiny, 2.0 for small "
    "and medium, 3.0 for large",
    "normalization": "'inception' for timm's vit_*, 'imagenet' for DeiT, or None if "
    "you normalise the pixels yourself",
    "gelu": "'exact', 'tanh' or 'quick', the form of the GELU",
    "table_grid": "(height, width) of the position table's grid, in patches",
}

HF_TYPES = ("vit", "deit", "vit_msn")
HF_GELU = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "quick_gelu": "quick",
}
TIMM_GELU = {"gelu": "exact", "gelu_tanh": "tanh", "quick_gelu": "quick"}
TIMM_POOLS = {"token": "class", "avg": "mean", "map": "attention"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers

# Of timm's architectures, by their names, what neither shapes nor config.json say.
TIMM_TANH = r"siglip.*_512|patch32_siglip|giantopt|so400m_patch16_siglip"
TIMM_NOT_512_TANH = r"vit_base_patch16_siglip"
TIMM_HEADS = {"vit_base_patch16_gap_224": 16, "vit_giant_patch16_radio_v3": 24}
TIMM_OTHER = {  # whose tensors look like those of a ViT
    r"_rpn_": "it normalises after its branches",
    r"rope|_dinov3|_pe_|lingbot|sapiens2": "its positions are rotary, of another kind",
}


def facts(config: dict, preprocessor: dict) -> dict:
    """Arguments that the configuration of a checkpoint tells.

    Raises:
        ValueError: If it is of another model, or asks for what our models lack.
    """
    try:
        if "architecture" in config:
            return _timm(config)
        if "model_type" in config:
            return _hf(config, preprocessor)
    except (TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(f"config.json must be whole, it is not: {error!r}") from error
    return {}


def _timm(config):
    name = str(config["architecture"])
    arguments = config.get("model_args") or {}
    for pattern, why in TIMM_OTHER.items():
        if re.search(pattern, name):
            raise ValueError(f"keras_vit has no model such as timm's {name}: {why}.")
    if arguments.get("pool_include_prefix"):
        raise ValueError(
            f"timm's {name} pools its prefix tokens too; no model of keras_vit does."
        )
    data = config.get("pretrained_cfg") or config
    found = {}
    heads = arguments.get("num_heads")
    if heads is not None:
        found["num_heads"] = heads if isinstance(heads, int) else tuple(heads)
    elif name in TIMM_HEADS:
        found["num_heads"] = TIMM_HEADS[name]
    found["epsilon"] = 1e-5 if "_clip_" in name else 1e-6
    found["gelu"] = _timm_gelu(name, arguments.get("act_layer"))
    pool = arguments.get("global_pool", config.get("global_pool"))
    if pool is not None:
        found["pool"] = TIMM_POOLS.get(pool, pool)
    if arguments.get("pos_embed") in ("", "none"):
        found["position"] = "none"
    size = arguments.get("img_size") or (data.get("input_size") or [])[1:]
    if size:
        found["image_size"] = _pair(size)
    if data.get("mean") and data.get("std"):
        found["normalization"] = _normalization(data["mean"], data["std"])
    squash = data.get("crop_mode") == "squash" and data.get("crop_pct") == 1.0
    found["crop_ratio"] = None if squash else data.get("crop_pct") or 0.875
    if data.get("interpolation") in ("bilinear", "bicubic"):
        found["interpolation"] = data["interpolation"]
    labels = config.get("label_names") or data.get("label_names")
    if isinstance(labels, list):
        found["labels"] = _timm_labels(config, labels)
    found["constant_drop_path"] = name.startswith("deit3_")
    return found


def _timm_gelu(name, activation):
    if activation is not None:
        if activation not in TIMM_GELU:
            raise ValueError(
                f"keras_vit has no activation {activation!r}, which timm's {name} "
                f"asks for; it has {', '.join(map(repr, TIMM_GELU))}."
            )
        return TIMM_GELU[activation]
    if "quickgelu" in name:
        return "quick"
    tanh = re.search(TIMM_TANH, name) and not re.search(TIMM_NOT_512_TANH, name)
    return "tanh" if tanh else "exact"


def _timm_labels(config, labels):
    """The words for ImageNet's `n01440764`, where the file has them."""
    words = config.get("label_descriptions") or {}
    if isinstance(words, dict):
        labels = [words.get(label, label) for label in labels]
    return tuple(str(label) for label in labels)


def _hf(config, preprocessor):
    kind = config["model_type"]
    if kind not in HF_TYPES:
        raise ValueError(
            f"config.json must have model_type {', '.join(map(repr, HF_TYPES))}, "
            f"got {kind!r}, which is another model."
        )
    activation = config.get("hidden_act", "gelu")
    if activation not in HF_GELU:
        raise ValueError(
            f"keras_vit has no activation {activation!r}, which config.json asks for; "
            f"it has {', '.join(map(repr, HF_GELU))}."
        )
    found = {"gelu": HF_GELU[activation]}
    if isinstance(config.get("num_attention_heads"), int):
        found["num_heads"] = config["num_attention_heads"]
    found["epsilon"] = float(config.get("layer_norm_eps", 1e-12))
    if config.get("image_size"):
        found["image_size"] = _pair(config["image_size"])
    found["pooler_act"] = config.get("pooler_act", "tanh")
    names = config.get("id2label")
    if isinstance(names, dict):
        labels = tuple(str(names.get(str(i), i)) for i in range(len(names)))
        if labels != tuple(f"LABEL_{i}" for i in range(len(labels))):
            found["labels"] = labels
    return found | _hf_preprocessing(preprocessor)


def _hf_preprocessing(preprocessor):
    found = {}
    if preprocessor.get("image_mean") and preprocessor.get("image_std"):
        mean, deviation = preprocessor["image_mean"], preprocessor["image_std"]
        if not preprocessor.get("do_normalize", True):
            mean, deviation = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        factor = preprocessor.get("rescale_factor", 1 / 255)
        factor = factor if preprocessor.get("do_rescale", True) else 1.0
        if abs(255 * factor - 1) > 1e-6:  # ours are of pixels in 0..1
            mean = [x / (255 * factor) for x in mean]
            deviation = [x / (255 * factor) for x in deviation]
        found["normalization"] = _normalization(mean, deviation)
    if preprocessor.get("resample") in RESAMPLE:
        found["interpolation"] = RESAMPLE[preprocessor["resample"]]
    if preprocessor.get("do_center_crop"):
        sides = [preprocessor.get(key) for key in ("crop_size", "size")]
        crop, size = (x.get("height") if isinstance(x, dict) else x for x in sides)
        if isinstance(crop, int) and isinstance(size, int) and crop <= size:
            found["crop_ratio"] = crop / size
    return found


def _pair(size):
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return tuple(int(side) for side in sides)


def _normalization(mean, deviation):
    """The name of a normalisation, or the numbers where it has none."""
    pair = tuple(map(float, mean)), tuple(map(float, deviation))
    for name, known in NORMALIZATIONS.items():
        if pair == known:
            return name
    return pair


def usual_pixels(module, layout, shapes, table_prefix, image_size):
    """What the code that published such a checkpoint does to pixels.

    Returns:
        Normalisation, crop ratio, interpolation, and whose code it is; None for that
        where nothing tells, and the normalisation has to be asked for.
    """
    if module is not vit:
        row = next(iter(module.VARIANTS.values()))
        name = module.__name__.rpartition(".")[2]
        return (
            row.normalization,
            row.crop_ratio,
            row.interpolation,
            f"the code of {name}",
        )
    if layout == "google":
        return "inception", None, "bilinear", "Google's own code"
    if "dist_token" in shapes:
        return "imagenet", 0.875, "bicubic", "DeiT's own code"
    if layout == "hf":
        return "inception", None, "bilinear", "the usual one of ViT there"
    classed = "cls_token" in shapes and "reg_token" not in shapes
    if "blocks.0.ls1.gamma" in shapes and classed and not table_prefix:
        return "imagenet", 1.0, "bicubic", "DeiT III's own code"
    sides = (image_size,) if isinstance(image_size, int) else image_size or (224,)
    large = min(side or 224 for side in sides) >= 384
    return None, 1.0 if large else 0.9, "bicubic", None
