"""timm and transformers, with whose own models checkpoints are compared.

Every parameter of theirs is random here, norms and LayerScale too: a mix-up shows.
"""

import functools
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import to_numpy

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4
MEANS = {  # mean and standard deviation of pixels in 0..1
    "inception": ((0.5,) * 3, (0.5,) * 3),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@functools.cache
def timm():
    """timm; the test is skipped where it, torch or safetensors is not installed."""
    pytest.importorskip("safetensors")
    declare_operators(pytest.importorskip("torch"))
    return pytest.importorskip("timm")


@functools.cache
def transformers():
    """transformers; the test is skipped where it is not installed."""
    pytest.importorskip("safetensors")
    declare_operators(pytest.importorskip("torch"))
    return pytest.importorskip("transformers")


@functools.cache
def declare_operators(torch):
    """Declare torchvision's operators where it was built for another torch.

    timm imports torchvision, and that gives rules of shapes to operators that its own
    library should have declared; models of timm use none of them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None:
        return None
    rules = Path(found.origin).with_name("_meta_registrations.py").read_text("utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(set(re.findall(r'"torchvision::(\w+)"', rules))):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor x) -> Tensor")
    return library  # it lives as long as this


def quick(kinds, *names):
    """Kinds as parameters of a test; those not named are `slow` and `first`."""
    assert set(names) <= set(kinds)
    slow = pytest.mark.slow, pytest.mark.first
    return [kind if kind in names else pytest.param(kind, marks=slow) for kind in kinds]


def random_weights(model, seed=0):
    """Give every parameter of a torch module random values; return it, to be asked."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    for name, value in sorted(model.state_dict().items()):
        if value.ndim > 1 and "token" not in name and "pos" not in name:
            fan_in = value[0].numel()
            drawn = draw(*value.shape) * fan_in**-0.5
        else:
            drawn = draw(*value.shape) * 0.3
        if re.search(r"norm\w*\.weight|gamma", name):
            drawn = 1 + drawn
        value.copy_(drawn)
    return model.eval()


def images(height=64, width=None, seed=0):
    """Two raw images, `(2, height, width, 3)` of 0..255."""
    width = height if width is None else width
    random = np.random.default_rng(seed)
    return random.uniform(0, 255, (2, height, width, 3)).astype("float32")


def normalized(raw, normalization):
    """Pixels as a torch model takes them: normalised, `(B, 3, H, W)`."""
    import torch

    if isinstance(normalization, str):
        normalization = MEANS[normalization]
    mean, deviation = normalization
    pixels = (raw / 255 - np.float32(mean)) / np.float32(deviation)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def asked(model, raw, normalization="inception", method=None, **kwargs):
    """What a torch model answers to raw images."""
    import torch

    with torch.no_grad():
        answer = (method or model)(normalized(raw, normalization), **kwargs)
    for name in ("logits", "pooler_output"):
        answer = getattr(answer, name, answer)
    return answer.numpy()


def ours(model, raw):
    """What our model answers."""
    return to_numpy(model.predict_on_batch(raw))


def assert_same(found, expected):
    """Answers are the same, and say something: they differ between the images."""
    assert found.shape == expected.shape
    assert np.ptp(expected, axis=0).max() > 100 * TOLERANCE
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


# --- timm


def make_timm(architecture="vit_tiny_patch16_224", **kwargs):
    """A small model of timm with random weights: 64 px, D 48, 2 blocks, 7 classes."""
    small = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    small |= {"img_size": 64, "num_classes": 7}
    return random_weights(timm().create_model(architecture, **{**small, **kwargs}))


def make_twins(**kwargs):
    """A small Twins-PCPVT of timm with random weights."""
    small = {
        "img_size": 64,
        "num_classes": 7,
        "embed_dims": (16, 32, 40, 64),
        "num_heads": (1, 2, 5, 8),
        "depths": (2, 2, 2, 1),
    }
    model = timm().create_model("twins_pcpvt_small", **{**small, **kwargs})
    return random_weights(model)


def save_timm(model, folder, **config):
    """Write weights and `config.json` as timm does; return the folder."""
    from safetensors.torch import save_model

    hub = importlib.import_module("timm.models._hub")
    folder.mkdir(exist_ok=True)
    save_model(model, str(folder / "model.safetensors"))
    hub.save_config_for_hf(model, str(folder / "config.json"), config)
    return folder


def load_timm(folder):
    """The model of a folder, as timm builds it from there."""
    return timm().create_model(f"local-dir:{folder}", pretrained=True).eval()


# --- Google


def google_arrays(new=False, pooled=False, stacked=False, prefix=""):
    """Random arrays by the names and shapes of Google's files: 64 px, D 48, 3 heads.

    Args:
        new: Names of big_vision; else those of the files of the ViT paper.
        pooled: An attention pooling, and no class token.
        stacked: Both blocks in one array.
        prefix: Before every name.
    """
    numbers = ("0", "0", "1") if new else ("1", "3", "2")
    table = "pos_embedding" if new else "Transformer/posembed_input/pos_embedding"
    shapes = {"embedding/kernel": (16, 16, 3, 48), "embedding/bias": (48,)}
    shapes |= {
        table: (1, 16 if pooled else 17, 48),
        **_norm("Transformer/encoder_norm"),
    }
    shapes |= {"head/kernel": (48, 7), "head/bias": (7,)}
    first = (2,) if stacked else ()
    for i in [""] if stacked else ["_0", "_1"]:
        for name, shape in _google_block(*numbers).items():
            shapes[f"Transformer/encoderblock{i}/{name}"] = (*first, *shape)
    if pooled:
        names = {"MAPHead_0/probe": (1, 1, 48)}
        for name, shape in _google_block("0", "0", "0").items():
            names[f"MAPHead_0/{name}"] = shape
        shapes |= names
    else:
        shapes["cls"] = (1, 1, 48)
    random = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        array = random.normal(size=shape)
        array *= 0.15 if name.endswith("kernel") else 0.3
        arrays[prefix + name] = np.float32(array + name.endswith("scale"))
    return arrays


def _norm(name):
    return {f"{name}/scale": (48,), f"{name}/bias": (48,)}


def _google_block(attention, mlp, norm):
    """Shapes of a block by the numbers that Flax gave its parts."""
    attention = f"MultiHeadDotProductAttention_{attention}"
    shapes = {**_norm("LayerNorm_0"), **_norm(f"LayerNorm_{norm}")}
    for name in ("query", "key", "value"):
        shapes[f"{attention}/{name}/kernel"] = (48, 3, 16)
        shapes[f"{attention}/{name}/bias"] = (3, 16)
    shapes |= {f"{attention}/out/kernel": (3, 16, 48), f"{attention}/out/bias": (48,)}
    for i, (inside, outside) in enumerate([(48, 192), (192, 48)]):
        shapes[f"MlpBlock_{mlp}/Dense_{i}/kernel"] = (inside, outside)
        shapes[f"MlpBlock_{mlp}/Dense_{i}/bias"] = (outside,)
    return shapes


# --- transformers


def make_hf(kind="ViTForImageClassification", **kwargs):
    """A small model of transformers with random weights."""
    small = {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "image_size": 64,
    }
    library = transformers()
    known = {**small, **kwargs}
    if "id2label" not in known:
        known.setdefault("num_labels", 7)
    family = re.match(r"ViTMSN|ViT|DeiT", kind)[0]
    config = getattr(library, f"{family}Config")(**known)
    return random_weights(getattr(library, kind)(config))


def save_hf(model, folder, normalization):
    """Write weights and both configurations; return the folder."""
    model.save_pretrained(folder)
    mean, deviation = MEANS[normalization]
    config = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    config |= {"image_mean": mean, "image_std": deviation, "rescale_factor": 1 / 255}
    config |= {"size": {"height": 64, "width": 64}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


# --- ours


def random_ours(model, seed=0):
    """Give every weight of a model of ours random values; return it."""
    random = np.random.default_rng(seed)
    for weight in model.weights:
        drawn = random.normal(size=weight.shape) * 0.3
        if weight.path.endswith("/kernel"):
            drawn *= 3 * (np.prod(weight.shape) / weight.shape[-1]) ** -0.5
        if weight.path.endswith("gamma"):
            drawn += 1
        if weight.path.endswith("moving_variance"):
            drawn = 0.5 + abs(drawn)
        weight.assign(drawn)
    return model
