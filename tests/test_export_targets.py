import json
import zipfile

import keras
import numpy as np
import onnx
import pytest
from conftest import to_numpy
from test_command import run

import export.targets
from export import target_worker
from export.targets import TARGETS, TargetModel, export_to
from keras_vit import CPVT, PCPVT, LVViT, ViT

# TensorFlow alone converts, whatever backend has trained.
converts = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the worker has TensorFlow"
)
LABELS = ("cat", "dog", "émeu", "yak")
SMALL = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}
PYRAMID = {"embed_dims": (8,) * 4, "num_heads": (1,) * 4, "depths": (1,) * 4}


def build(name, seed=1, **kwargs):
    settings = {"num_classes": 4, "labels": LABELS, **kwargs}
    match name:
        case "vit":
            model = ViT("tiny", image_size=16, **SMALL, **settings)
        case "distilled":
            any_size = {"image_size": None, "position_grid": (2, 2)}
            model = ViT("deit_tiny_distilled", **any_size, **SMALL, **settings)
        case "lvvit":
            model = LVViT("tiny", image_size=16, stem_width=8, **SMALL, **settings)
        case "cpvt":
            peg = {"pool": "mean", "peg_positions": (0,)}
            model = CPVT("tiny", **peg, **SMALL, **settings)
        case "pcpvt":
            model = PCPVT("small", image_size=32, **PYRAMID, **settings)
    draw = np.random.default_rng(seed)
    for variable in model.trainable_weights:
        variable.assign(draw.normal(0, 0.3, variable.shape))
    return model


def check(model, path, size, bound=1e-4):
    target = TargetModel(path)
    images = np.random.default_rng(2).uniform(0, 255, (5, *size, 3)).astype("float32")
    expected = to_numpy(model(images))
    for number in (1, 5):
        logits = target(images[:number])["logits"]
        difference = np.abs(logits - expected[:number]).max()
        assert difference <= bound * max(1, np.abs(expected).max()), number
    return target(images), expected, target.metadata


def write(model, path, **metadata):
    """Convert without the process of its own, which takes longer than that."""
    target_worker._WRITERS[path.suffix](
        target_worker.in_float32(model), path, json.dumps(metadata)
    )
    return path


@converts
def test_an_onnx_file_answers_images_of_any_size(tmp_path):
    """DeiT's exact GELU and images that are padded: both need a word with tf2onnx."""
    model = build("distilled")
    path = write(model, tmp_path / "deit.onnx", labels=LABELS)
    answer, logits, metadata = check(model, path, (37, 21))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert metadata == {"labels": list(LABELS)}
    sides = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in sides] == ["N", "H", "W", 3]


@pytest.mark.first
def test_what_a_target_cannot_be_is_refused(tmp_path, monkeypatch):
    model = build("vit")
    with pytest.raises(
        ValueError, match=r"must end in .onnx, .tflite, .xml, got 'a.pb'"
    ):
        export_to(model, "a.pb")
    with pytest.raises(ValueError, match="must name the model's 4 classes, got 1"):
        export_to(model, tmp_path / "a.onnx", ["cat"])
    with pytest.raises(FileNotFoundError, match="There is no model file"):
        export_to(tmp_path / "nowhere.keras", tmp_path / "a.onnx")
    monkeypatch.setattr(model, "count_params", lambda: 2**29)
    with pytest.raises(ValueError, match=r"less than 2 GiB .* take 2.0 GiB"):
        export_to(model, tmp_path / "a.tflite")
    packages = ("ONNX", ("tf2onnx", "no_such_package"), True)
    monkeypatch.setitem(export.targets.TARGETS, ".onnx", packages)
    with pytest.raises(RuntimeError, match=r"ONNX needs no_such_package: pip install"):
        export_to(model, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@converts
def test_a_file_that_is_not_the_model_is_not_published(tmp_path):
    """Its runtime is asked, with one image and three."""
    model, other = build("vit"), build("vit", seed=2)
    metadata = {"labels": list(LABELS)}
    path = write(model, tmp_path / "a.tflite", **metadata)
    export.targets._check(model, path, metadata, 1e-5)
    with pytest.raises(ValueError, match=r"LiteRT must give the logits of .* within"):
        export.targets._check(other, path, metadata, 1e-5)
    with pytest.raises(ValueError, match=r"LiteRT must keep .*, it gives"):
        export.targets._check(model, path, {}, 1e-5)
    path.write_text("no model")
    with pytest.raises(ValueError, match="LiteRT cannot load this model"):
        export.targets._check(model, path, metadata, 1e-5)


@pytest.mark.first
def test_the_command_takes_a_file_for_a_target(tmp_path, capsys, monkeypatch):
    model = tmp_path / "model.keras"
    build("vit").save(model)
    arguments = ["export", model, tmp_path / "a.onnx", "--version", 3]
    status, _, error = run(capsys, monkeypatch, *arguments)
    assert (status, error) == (1, "Error: A file of ONNX has no --version, got 3.\n")
    arguments = ["export", model, tmp_path / "a.pt"]
    status, _, error = run(capsys, monkeypatch, *arguments)
    assert status == 1
    assert "must end in .onnx, .tflite, .xml, got" in " ".join(error.split())
    arguments = ["export", model, tmp_path / "models", "--features", "0, x"]
    status, _, error = run(capsys, monkeypatch, *arguments)
    assert status == 1 and "layers must be one of" in error and "got 'x'" in error
    assert sorted(x.name for x in tmp_path.iterdir()) == ["model.keras"]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", TARGETS)
def test_every_target_is_written_from_any_backend(
    tmp_path, suffix, capsys, monkeypatch
):
    """From a file, over an older one; associated files of LiteRT are a ZIP archive."""
    model = build("vit")
    model.save(tmp_path / "model.keras")
    path = tmp_path / f"model{suffix}"
    path.write_text("old")
    if suffix == ".tflite":  # by the command, once
        status, out, _ = run(
            capsys, monkeypatch, "export", tmp_path / "model.keras", path
        )
        assert status == 0 and f"checked in LiteRT's own runtime: {path}" in out
    else:
        export_to(tmp_path / "model.keras", path, progress=False)
    _, _, metadata = check(model, path, (16, 16))
    assert metadata["labels"] == list(LABELS)
    assert metadata["preprocess"] == {
        "image_size": [16, 16],
        "crop_ratio": None,
        "interpolation": "bilinear",
    }
    assert metadata["trained_with"] == keras.backend.backend()
    beside = {path.with_suffix(".bin")} if suffix == ".xml" else set()
    assert set(tmp_path.iterdir()) == {tmp_path / "model.keras", path} | beside
    if suffix == ".tflite":
        with zipfile.ZipFile(path) as archive:
            assert archive.read("labels.txt").decode().split() == list(LABELS)


@pytest.mark.slow
@converts
@pytest.mark.parametrize("name", ["lvvit", "cpvt", "pcpvt"])
def test_every_model_goes_into_every_target(tmp_path, name):
    model = build(name)
    for suffix in TARGETS:
        path = write(model, tmp_path / f"model{suffix}", labels=[name])
        own = model.input_shape[1:3]
        for size in [(16, 16), (45, 70)] if None in own else [own]:
            assert check(model, path, size)[2] == {"labels": [name]}


@converts
def test_a_model_of_mixed_precision_computes_in_float32(tmp_path):
    model = build("vit")
    keras.config.set_dtype_policy("mixed_bfloat16")
    path = write(build("vit"), tmp_path / "half.onnx", labels=LABELS)
    check(model, path, (16, 16))
