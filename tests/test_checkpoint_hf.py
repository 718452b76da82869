"""Checkpoints of transformers answer as there, and ours are loaded there."""

import json

import numpy as np
import peers
import pytest
from conftest import to_numpy
from peers import (
    asked,
    assert_same,
    images,
    make_hf,
    ours,
    quick,
    random_ours,
    save_hf,
    transformers,
)

from keras_vit import (
    CPVT,
    PCPVT,
    LVViT,
    ViT,
    class_labels,
    from_checkpoint,
    inspect_checkpoint,
    to_checkpoint,
)

pytestmark = pytest.mark.heavy

MODELS = {
    "plain": {},
    "epsilon": {"layer_norm_eps": 0.3},
    "tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "quick": {"hidden_act": "quick_gelu"},
    "no_bias": {"qkv_bias": False},
    "mlp": {"intermediate_size": 80, "patch_size": 32},
    "features": {"kind": "ViTModel", "add_pooling_layer": False},
    "teacher": {"kind": "DeiTForImageClassificationWithTeacher"},
    "teacher_epsilon": {
        "kind": "DeiTForImageClassificationWithTeacher",
        "layer_norm_eps": 0.3,
        "qkv_bias": False,
    },
    "deit": {"kind": "DeiTForImageClassification"},
    "msn": {"kind": "ViTMSNForImageClassification"},
    "not_square": {"image_size": (32, 96)},
}


def normalization(model):
    return "imagenet" if type(model).__name__.startswith("DeiT") else "inception"


def saved(folder, **kwargs):
    """A model of transformers, and its checkpoint."""
    model = make_hf(**kwargs)
    return model, save_hf(model, folder / "theirs", normalization(model))


@pytest.mark.parametrize("kind", quick(MODELS, "plain", "teacher_epsilon", "msn"))
def test_checkpoint_answers_as_in_transformers(kind, tmp_path):
    model, folder = saved(tmp_path, **MODELS[kind])
    raw = images(*MODELS[kind].get("image_size", (64, 64)))
    expected = asked(model, raw, normalization(model))
    assert_same(ours(from_checkpoint(folder), raw), expected)


@pytest.mark.parametrize("size", [48, 40])
def test_pooler_is_the_representation(size, tmp_path):
    model, folder = saved(tmp_path, kind="ViTModel", pooler_output_size=size)
    loaded = from_checkpoint(folder)
    assert loaded.output_shape == (None, size)
    assert loaded.get_layer("pre_logits").units == size
    assert_same(ours(loaded, images()), asked(model, images()))


def test_deit_model_pools_its_class_token(tmp_path):
    model, folder = saved(tmp_path, kind="DeiTModel")
    raw = images()
    assert_same(ours(from_checkpoint(folder), raw), asked(model, raw, "imagenet"))


@pytest.mark.first
def test_distillation_token_without_a_head_is_a_register(tmp_path):
    _, folder = saved(tmp_path, kind="DeiTForImageClassification")
    arguments = inspect_checkpoint(folder).arguments
    assert arguments["num_registers"] == 1
    assert not arguments["distillation_token"]


@pytest.mark.first
def test_labels_are_those_of_the_config(tmp_path):
    labels = ["tench", "goldfish", "great white shark"]
    _, folder = saved(tmp_path, id2label=dict(enumerate(labels)))
    assert class_labels(from_checkpoint(folder)) == tuple(labels)


@pytest.mark.first
def test_unnamed_labels_are_none(tmp_path):
    _, folder = saved(tmp_path)
    assert class_labels(from_checkpoint(folder)) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_preprocessor_is_honoured(changed, tmp_path):
    model, folder = saved(tmp_path)
    path = folder / "preprocessor_config.json"
    config = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps(config))
    mean, deviation = config["image_mean"], config["image_std"]
    if not config["do_normalize"]:
        mean, deviation = (0,) * 3, (1,) * 3
    scale = 255 * config.get("rescale_factor", 1 / 255)
    pair = tuple(tuple(x / scale for x in numbers) for numbers in (mean, deviation))
    raw = images()
    assert_same(ours(from_checkpoint(folder), raw), asked(model, raw, pair))


@pytest.mark.first
@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
def test_without_a_preprocessor_the_usual_normalization_is_assumed(kind, tmp_path):
    model, folder = saved(tmp_path, kind=kind)
    (folder / "preprocessor_config.json").unlink()
    report = inspect_checkpoint(folder)
    assert "normalization" in report.assumed
    assert report.arguments["normalization"] == normalization(model)


@pytest.mark.first
def test_preprocessor_says_how_pictures_are_made(tmp_path):
    _, folder = saved(tmp_path)
    path = folder / "preprocessor_config.json"
    config = json.loads(path.read_text())
    config |= {"do_center_crop": True, "crop_size": {"height": 64, "width": 64}}
    config |= {"size": {"height": 80, "width": 80}, "resample": 3}
    path.write_text(json.dumps(config))
    arguments = inspect_checkpoint(folder).arguments
    assert arguments["crop_ratio"] == 0.8
    assert arguments["interpolation"] == "bicubic"


def test_new_names_answer_as_the_golden_file(tmp_path):
    from safetensors.numpy import save_file

    golden = np.load(peers.GOLDEN / "hf_vit.npz")
    state = {k.removeprefix("state/"): golden[k] for k in golden if "state/" in k}
    save_file(state, tmp_path / "model.safetensors")
    model = from_checkpoint(
        tmp_path / "model.safetensors", num_heads=3, normalization=None
    )
    assert_same(ours(model, golden["images_nhwc"]), golden["logits"])


@pytest.mark.first
@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"kind": "ViTModel", "pooler_act": "relu"}, "must have a tanh"),
        ({"hidden_act": "relu"}, "no activation 'relu'"),
        ({"num_channels": 1}, "Images must have 3 channels"),
        ({"patch_size": (16, 32)}, "Patches must be square"),
    ],
)
def test_what_we_lack_is_refused(kwargs, message, tmp_path):
    _, folder = saved(tmp_path, **kwargs)
    with pytest.raises(ValueError, match=message):
        inspect_checkpoint(folder)


# --- another size


@pytest.mark.parametrize("size", quick([96, (32, 96), None], (32, 96)))
@pytest.mark.parametrize(
    "kind", ["ViTForImageClassification", "DeiTForImageClassificationWithTeacher"]
)
@pytest.mark.first
@pytest.mark.slow
def test_another_size_answers_as_in_transformers(kind, size, tmp_path):
    model, folder = saved(tmp_path, kind=kind)
    loaded = from_checkpoint(folder, image_size=size)
    for sides in [(96, 96), (64, 64), (32, 96)] if size is None else [size]:
        raw = images(*np.broadcast_to(sides, 2))
        expected = asked(
            model, raw, normalization(model), interpolate_pos_encoding=True
        )
        assert_same(ours(loaded, raw), expected)


# --- the way back

SMALL = {"image_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL |= {"num_classes": 7}
CLASSIFIER = "AutoModelForImageClassification"
TEACHER = "DeiTForImageClassificationWithTeacher"
WRITTEN = {  # variant, other arguments, class of transformers
    "plain": ("tiny", {}, CLASSIFIER),
    "deit": ("deit_tiny", {"mlp_ratio": 3.0}, CLASSIFIER),
    "distilled": ("deit_tiny_distilled", {}, TEACHER),
    "epsilon": ("tiny", {"epsilon": 0.3, "gelu": "quick"}, CLASSIFIER),
    "no_bias": ("tiny", {"qkv_bias": False, "patch_size": 32}, CLASSIFIER),
    "not_square": ("tiny", {"image_size": (32, 96)}, CLASSIFIER),
    "no_class_position": ("tiny", {"class_position": False}, CLASSIFIER),
    "distilled_no_class_position": (
        "deit_tiny_distilled",
        {"class_position": False, "epsilon": 1e-5},
        TEACHER,
    ),
    "raw": ("tiny", {"normalization": None}, CLASSIFIER),
    "own_pixels": (
        "tiny",
        {"normalization": ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))},
        CLASSIFIER,
    ),
    "labels": ("tiny", {"num_classes": 2, "labels": ("cat", "dog")}, CLASSIFIER),
    "representation": (
        "tiny",
        {"num_classes": 0, "representation_size": 40},
        "ViTModel",
    ),
}


def written(kind, folder):
    """A model of ours with random weights, and what transformers makes of its files."""
    variant, kwargs, name = WRITTEN[kind]
    library = transformers()
    model = random_ours(ViT(variant, **{**SMALL, **kwargs}))
    to_checkpoint(model, folder, layout="hf")
    theirs, loaded = getattr(library, name).from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loaded.values()), loaded
    return model, theirs.eval()


def pixels(folder):
    """Mean and deviation of pixels in 0..1, as the preprocessor's config says."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    assert config["do_rescale"] and config["do_normalize"]
    assert config["rescale_factor"] == 1 / 255
    return config["image_mean"], config["image_std"]


@pytest.mark.parametrize(
    "kind", quick(WRITTEN, "plain", "distilled_no_class_position", "representation")
)
def test_our_model_answers_as_ours_in_transformers(kind, tmp_path):
    model, theirs = written(kind, tmp_path)
    raw = images(*model.input_shape[1:3])
    assert_same(asked(theirs, raw, pixels(tmp_path)), ours(model, raw))
    if kind == "labels":
        assert theirs.config.id2label == {0: "cat", 1: "dog"}


def test_our_features_are_the_class_token_in_transformers(tmp_path):
    library = transformers()
    model = random_ours(ViT("tiny", **{**SMALL, "num_classes": 0}))
    to_checkpoint(model, tmp_path, layout="hf")
    theirs = library.ViTModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    tokens = asked(
        theirs,
        images(),
        pixels(tmp_path),
        lambda x: theirs(x).last_hidden_state,
    )
    assert_same(tokens[:, 0], ours(model, images()))


def same_weights(found, expected):
    assert [v.path for v in found.weights] == [v.path for v in expected.weights]
    for weight, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(weight), to_numpy(other))


@pytest.mark.parametrize(
    "kind",
    quick([*WRITTEN, "no_head", "distilled_no_head"], "labels", "distilled_no_head"),
)
def test_our_model_comes_back_bit_equal(kind, tmp_path):
    pytest.importorskip("safetensors")
    no_head = {"num_classes": 0}
    heads = {"no_head": "tiny", "distilled_no_head": "deit_tiny_distilled"}
    variant, kwargs = WRITTEN.get(kind, (heads.get(kind), no_head))[:2]
    model = random_ours(ViT(variant, **{**SMALL, **kwargs}))
    to_checkpoint(model, tmp_path, layout="hf")
    back = from_checkpoint(tmp_path)
    same_weights(back, model)
    raw = images(*model.input_shape[1:3])
    np.testing.assert_array_equal(ours(back, raw), ours(model, raw))


@pytest.mark.parametrize(
    "kind", quick(["deit", "distilled", "labels", "own_pixels"], "distilled")
)
@pytest.mark.first
@pytest.mark.slow
def test_what_transformers_saved_of_it_is_the_same_model(kind, tmp_path):
    """Their file has no description of ours: all is read from names and configs."""
    model, theirs = written(kind, tmp_path)
    theirs.save_pretrained(tmp_path / "again")
    config = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "again" / "preprocessor_config.json").write_text(config)
    back = from_checkpoint(tmp_path / "again")
    same_weights(back, model)
    np.testing.assert_array_equal(ours(back, images()), ours(model, images()))
    assert class_labels(back) == class_labels(model)
    found, expected = (x.get_layer("normalize") for x in (back, model))
    assert found.normalization == expected.normalization
    assert found.interpolation == expected.interpolation
    sides = [round(64 / (x.crop_ratio or 1)) for x in (found, expected)]
    assert sides[0] == sides[1]  # of a picture, before the crop


PYRAMID = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1)}
PYRAMID |= {"num_heads": (1, 2, 5, 8), "image_size": 64, "num_classes": 7}
LACKING = {
    "cpvt": (lambda: CPVT("tiny", **SMALL), "family='ViT'.*'CPVT'"),
    "lvvit": (lambda: LVViT("tiny", **SMALL), "family='ViT'.*'LVViT'"),
    "pcpvt": (lambda: PCPVT("small", **PYRAMID), "family='ViT'.*'PCPVT'"),
    **{
        name: (lambda name=name, x=x: ViT("tiny", **{**SMALL, name: x}), pattern)
        for name, x, pattern in [
            ("pool", "mean", "pool='class', this model has 'mean'"),
            ("position", "rotary", "position='learned', this model has 'rotary'"),
            ("num_registers", 2, "num_registers=0, this model has 2"),
            ("layer_scale", 0.1, "layer_scale=None, this model has 0.1"),
            ("qk_norm", True, "qk_norm=False, this model has True"),
            ("pre_norm", True, "pre_norm=False, this model has True"),
            ("residual_scale", 2.0, "residual_scale=1, this model has 2.0"),
            ("representation_size", 40, "no representation_size before a classifier"),
        ]
    },
}


@pytest.mark.first
@pytest.mark.parametrize(
    "kind", quick(LACKING, *set(LACKING) - {"cpvt", "lvvit", "pcpvt"})
)
def test_what_transformers_lacks_is_refused_and_nothing_is_written(kind, tmp_path):
    build, message = LACKING[kind]
    model = build()
    with pytest.raises(ValueError, match=message):
        to_checkpoint(model, tmp_path / "theirs", layout="hf")
    with pytest.raises(ValueError, match=message):
        to_checkpoint(model, tmp_path / "theirs.safetensors", layout="hf")
    assert not list(tmp_path.iterdir())
