"""`keras-vit inspect` and `keras-vit convert`, on files that `to_checkpoint` wrote."""

import json
import os
import re
import sys
import warnings

import keras
import numpy as np
import pytest
from conftest import to_numpy
from safetensors.numpy import load_file, save_file
from test_command import run

import keras_vit
from keras_vit import ViT, class_labels, from_checkpoint, inspect_checkpoint
from training import convert

LABELS = ("cat", "dog", "[bold]owl")
IMAGES = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
TOLD = ("--set", "num_heads=3", "--set", "normalization=inception")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model in every form, and files that hold none."""
    folder = tmp_path_factory.mktemp("files")
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3}
    model = ViT("tiny", depth=2, num_classes=3, labels=LABELS, **sizes)
    model.get_layer("head").bias.assign([0.1, -0.2, 0.3])
    model.save(folder / "model.keras")
    keras_vit.to_checkpoint(model, folder / "model.safetensors")
    keras_vit.to_checkpoint(model, folder / "timm")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "bare.safetensors")
    save_file({"a.weight": np.zeros((2, 3), "float32")}, folder / "foreign.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    (folder / "flipped.safetensors").write_bytes(flipped)
    whole = (folder / "model.keras").read_bytes()
    (folder / "cut.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "run").mkdir()
    (folder / "run/last.keras").write_bytes(whole)
    (folder / "run/run.json").write_text(json.dumps({"labels": list(LABELS)}))
    np.savez(folder / "run/state.npz", history="[]")
    (folder / "empty").mkdir()
    return folder


def logits(model):
    return to_numpy(model(IMAGES))


def expected(files):
    return logits(keras.saving.load_model(files / "model.keras"))


@pytest.mark.parametrize("name", ["model.safetensors", "model.keras", "run", "timm"])
@pytest.mark.parametrize("columns", [200, 40])
def test_inspect_shows_every_row_whole(files, name, columns, capsys, monkeypatch):
    source = files / name
    code, out, err = run(capsys, monkeypatch, "inspect", source, columns=columns)
    assert code == 0 and err == ""
    file = source / "last.keras" if name == "run" else source
    shown = re.sub(r"[│\s]", "", out)
    rows = inspect_checkpoint(str(file)).rows()
    assert len(rows) > 20
    for row in rows:
        for text in row:
            assert re.sub(r"\s", "", text) in shown
    assert out.splitlines()[-1] == f"Next: keras-vit convert {source} model.keras"
    table = out.splitlines()[:-1]
    assert max(map(len, table)) <= columns


def test_inspect_takes_other_arguments(files, capsys, monkeypatch):
    arguments = ["--set", "image_size=null", "--set", "num_classes=5"]
    source = files / "model.safetensors"
    code, out, _ = run(capsys, monkeypatch, "inspect", source, *arguments)
    words = [" ".join(re.sub("│", " ", line).split()) for line in out.splitlines()]
    assert code == 0 and "image_size None" in words and "num_classes 5" in words
    assert "fresh head/kernel, head/bias: num_classes=5" in words


@pytest.mark.parametrize("name", ["model.safetensors", "model.keras", "run", "timm"])
def test_a_converted_checkpoint_is_the_same_model(
    files, name, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, "convert", files / name, "new/own.keras")
    assert code == 0 and err == ""
    assert out.splitlines() == [
        "ViT of 19,635 parameters: new/own.keras",
        "Next: keras-vit train finetune --from new/own.keras --data folder:PHOTOS",
        "      keras-vit export new/own.keras models/own",
    ]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["own.keras"]
    model = keras.saving.load_model(tmp_path / "new/own.keras")
    assert class_labels(model) == LABELS and model.count_params() == 19_635
    np.testing.assert_allclose(logits(model), expected(files), atol=1e-5)


def test_convert_says_what_was_done_in_plain_sentences(
    files, tmp_path, capsys, monkeypatch
):
    out_file = tmp_path / "own.keras"
    source = files / "model.safetensors"
    options = ["--image-size", "48x64", "--set", "num_classes=5"]
    code, out, err = run(capsys, monkeypatch, "convert", source, out_file, *options)
    assert code == 0 and err == ""
    assert out.splitlines()[:4] == [
        "Note: position table resampled from 4 x 4 to 6 x 8 (bicubic_antialias).",
        "Fresh: head/kernel, head/bias: num_classes=5.",
        "Left out: head.bias, head.weight: num_classes=5.",
        f"ViT of 20,453 parameters: {out_file}",
    ]
    model = keras.saving.load_model(out_file)
    assert model.input_shape == (None, 48, 64, 3) and model.output_shape == (None, 5)
    with pytest.warns(UserWarning, match="fresh because of num_classes=5"):
        same = from_checkpoint(source, image_size=(48, 64), num_classes=5)
    for ours, theirs in zip(model.layers, same.layers, strict=True):
        if ours.name != "head":
            for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
    source = files / "bare.safetensors"
    code, out, _ = run(capsys, monkeypatch, "convert", source, out_file, *TOLD)
    assert code == 0
    assert "Assumed: gelu='exact', that of PyTorch code." in out.splitlines()


def test_null_is_none_and_the_model_takes_any_size(
    files, tmp_path, capsys, monkeypatch
):
    out_file = tmp_path / "own.keras"
    arguments = ["convert", files / "model.keras", out_file, "--set", "image_size=null"]
    assert run(capsys, monkeypatch, *arguments)[0] == 0
    model = keras.saving.load_model(out_file)
    assert model.input_shape == (None, None, None, 3)
    np.testing.assert_allclose(logits(model), expected(files), atol=1e-5)


@pytest.mark.parametrize("layout", ["timm", "hf"])
@pytest.mark.parametrize("name", ["back", "back.safetensors"])
def test_convert_goes_back_to_a_layout(
    files, layout, name, tmp_path, capsys, monkeypatch
):
    out_path = tmp_path / "new" / name
    arguments = ["convert", files / "run", out_path, "--layout", layout]
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert code == 0 and err == ""
    assert out.splitlines() == [
        f"ViT of 19,635 parameters: {out_path}",
        f"Next: keras-vit inspect {out_path}",
    ]
    assert (out_path / "config.json").is_file() == (name == "back")
    assert inspect_checkpoint(out_path).layout == layout
    np.testing.assert_allclose(
        logits(from_checkpoint(out_path)), expected(files), atol=1e-5
    )


@pytest.mark.parametrize("layout", [None, "timm"])
def test_a_conversion_that_fails_changes_nothing(
    files, layout, tmp_path, capsys, monkeypatch
):
    name = "own.keras" if layout is None else "own.safetensors"
    out_path = tmp_path / "new" / name
    options = [] if layout is None else ["--layout", layout]
    arguments = ["convert", files / "cut.safetensors", out_path, *options]
    assert run(capsys, monkeypatch, *arguments)[0] == 1
    assert not (tmp_path / "new").exists()
    out_path.parent.mkdir()
    out_path.write_bytes(b"before")
    arguments = ["convert", files / "flipped.safetensors", out_path, *options]
    assert run(capsys, monkeypatch, *arguments)[0] == 1
    assert [x.name for x in (tmp_path / "new").iterdir()] == [name]
    assert out_path.read_bytes() == b"before"


def test_a_model_is_converted_onto_its_own_file(files, tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes((files / "model.keras").read_bytes())
    convert.convert(str(path), path, image_size=64)
    model = keras.saving.load_model(path)
    assert model.input_shape == (None, 64, 64, 3)
    assert os.listdir(tmp_path) == ["model.keras"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("inspect nowhere", "There is no checkpoint nowhere."),
        ("inspect {files}/empty", "empty must hold a checkpoint, such as"),
        ("inspect {files}/cut.safetensors", "cut.safetensors is damaged"),
        ("inspect {files}/cut.keras", "it is damaged or another kind."),
        ("inspect {files}/foreign.safetensors", "must hold a vision transformer"),
        ("inspect {files}/bare.safetensors", "num_heads"),
        ("inspect {files}/model.keras --set imagesize=3", "Did you mean 'image_size'?"),
        ("inspect {files}/model.keras --set depth", "must be NAME=VALUE, got 'depth'."),
        (
            "inspect {files}/model.keras --set num_heads=three",
            "A value has the wrong type, of num_heads='three': ",
        ),
        ("convert nowhere out/x.keras", "There is no checkpoint nowhere."),
        ("convert {files}/flipped.safetensors out/x.keras", "(SHA-256)"),
        (
            "convert {files}/model.keras out/x.npz",
            "OUT must end in .keras, got 'out/x.",
        ),
        ("convert {files}/model.keras out/x", "--layout timm or --layout hf writes"),
        (
            "convert {files}/model.keras out/x.keras --layout timm",
            "OUT must be a folder or end in .safetensors with --layout timm, got",
        ),
        (
            "convert {files}/model.keras out/x --layout flax",
            "layout must be one of 'timm', 'hf', got 'flax'.",
        ),
        (
            "convert {files}/model.keras out/x.keras --image-size 33",
            "patch_size=8 must divide the image height and width, got 33 x 33.",
        ),
        (
            "convert {files}/model.keras out/x.keras --image-size big",
            "--image-size must be N or HxW, in pixels, got 'big'.",
        ),
        (
            "convert {files}/model.keras {files}/model.keras/x.keras",
            "model.keras",  # a file, not a folder
        ),
    ],
)
def test_a_wrong_input_is_one_sentence(
    files, tmp_path, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    words = [word.format(files=files) for word in arguments.split()]
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "library, source",
    [
        ("safetensors", "{files}/model.safetensors"),
        ("huggingface_hub", "hf:owner/name"),
    ],
)
def test_a_missing_library_is_one_sentence(files, library, source, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)  # its import fails
    source = source.format(files=files)
    code, _, err = run(capsys, monkeypatch, "inspect", source)
    assert code == 1 and err.startswith(f"Error: {source} is ")
    assert f"pip install {library}" in err and len(err.splitlines()) == 1


def test_warnings_of_others_stay_warnings():
    said = []
    with (
        pytest.warns(RuntimeWarning, match="theirs"),
        convert.saying_warnings(said.append),
    ):
        warnings.warn("ours", stacklevel=1)
        warnings.warn("theirs", RuntimeWarning, stacklevel=1)
    assert said == ["ours"]
