"""Training that starts from a checkpoint: the recipe `finetune`, and any other."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_command import run
from test_data import write_images

from keras_vit import CPVT, ViT, class_labels, from_checkpoint, to_checkpoint
from keras_vit import __main__ as command
from keras_vit.model_file import sha256
from training.files import checkpoint_identity, checkpoint_source
from training.loop import precision
from training.recipes import find_recipe

TESTS = Path(__file__).parent
SIZES = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3}
FOLDER = "--set epochs=2 --set batch_size=8 --set dropout=0.1".split()


def settings(*changes):
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A run of `digits`, a tiny checkpoint of two classes, and images of two others."""
    folder = tmp_path_factory.mktemp("finetune")
    write_images(folder / "images", {"ant": 30, "bee": 30})
    model = ViT("tiny", depth=2, num_classes=2, labels=("no", "yes"), **SIZES)
    to_checkpoint(model, folder / "tiny.safetensors")
    changes = ("epochs=4", "depth=1", "batch_size=16", "learning_rate=4e-3")
    changes += ("random_affine=null", "drop_path_rate=0", "warmup_epochs=1")
    call(folder, "train", "digits", *settings(*changes))
    return folder


def call(folder, *arguments):
    """What the command line prints in a folder, where a fixture asks."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["keras-vit", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_, contextlib.redirect_stdout(printed):
            command.main()
        assert not exit_.value.code
    return printed.getvalue()


def history(run_dir):
    """Rows of the history without the time they took."""
    rows = list(csv.DictReader((run_dir / "history.csv").open()))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_trained_model_is_fine_tuned_at_another_size(work, capsys, monkeypatch):
    """Digits at 32 px, then one epoch at 48 px from what was learned."""
    monkeypatch.chdir(work)
    arguments = ["--from", "runs/digits", "--image-size", "48", "--data", "digits"]
    arguments += settings("epochs=1", "random_flip=false")
    code, out, _ = run(capsys, monkeypatch, "train", "finetune", *arguments)
    assert code == 0 and "fresh" not in out  # as many classes: the head too is loaded
    (row,) = history(work / "runs/finetune")
    score = float(row["val_accuracy"])
    assert score > 0.25  # of ten classes; the learning rate is far too small for fresh
    assert f"1 epochs done, held-out accuracy {score:.2%}." in out
    assert "Next: keras-vit export runs/finetune models/finetune" in out
    code, out, _ = run(
        capsys, monkeypatch, "evaluate", "runs/finetune", "--data", "digits"
    )
    assert code == 0 and f"accuracy {score:.2%}" in out
    model = keras.saving.load_model(work / "runs/finetune/last.keras")
    assert model.input_shape == (None, 48, 48, 3)
    assert class_labels(model) == tuple("0123456789")
    described = json.loads((work / "runs/finetune/run.json").read_text())
    assert described["recipe"]["checkpoint"] == "runs/digits"
    source = work / "runs/digits/last.keras"
    assert described["checkpoint"] == {
        "path": "runs/digits/last.keras",
        "sha256": sha256(source),
    }
    assert described["preprocess"]["image_size"] == [48, 48]


def test_another_size_and_number_of_classes_get_a_fresh_head_and_are_told_so(work):
    data = f"folder:{work}/images"
    options = ["--data", data, "--run-dir", "runs/ants", "--image-size", "48"]
    options += settings("epochs=1", "batch_size=27")
    out = call(work, "train", "finetune", "--from", "runs/digits", *options)
    assert out.splitlines()[0] == (
        "runs/digits/last.keras: fresh because of num_classes=2, to be trained: head."
    )
    model = keras.saving.load_model(work / "runs/ants/last.keras")
    assert model.output_shape == (None, 2) and class_labels(model) == ("ant", "bee")
    assert model.input_shape == (None, 48, 48, 3)


@pytest.fixture(scope="module")
def undisturbed(work):
    """A run directory, and the arguments that made it."""
    data = ["--data", f"folder:{work}/images", *FOLDER]
    arguments = ["train", "finetune", "--from", "tiny.safetensors", *data]
    call(work, *arguments, "--run-dir", "runs/undisturbed")
    return work / "runs/undisturbed", arguments


KILLED = """
import os, signal, sys
from keras_vit import __main__ as command
from training import loop

steps, update = iter(range(1, 1000)), loop.Progress.on_train_batch_end
def on_train_batch_end(self, batch, logs=None):
    update(self, batch, logs)
    if next(steps) == 9:  # of 6 an epoch
        os.kill(os.getpid(), signal.SIGKILL)
loop.Progress.on_train_batch_end = on_train_batch_end
sys.argv[0] = "keras-vit"
command.main()
"""


@pytest.mark.slow
def test_killed_and_run_again_it_ends_as_if_undisturbed(work, undisturbed):
    expected, arguments = undisturbed
    arguments = [*arguments, "--run-dir", "runs/killed"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert len(history(work / "runs/killed")) == 1
    call(work, *arguments)
    assert history(work / "runs/killed") == history(expected)
    last = keras.saving.load_model(work / "runs/killed/last.keras")
    same = keras.saving.load_model(expected / "last.keras")
    for ours, theirs in zip(last.weights, same.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["--from", "other.safetensors"],
            "its recipe.checkpoint is 'tiny.safetensors'",
        ),
        (
            ["--image-size", "24"],
            "its recipe.model.image_size is 'not given', now it is",
        ),
        (["--set", "image_size=null"], "image_size is 'not given', now it is None."),
        (
            ["--set", "drop_path_rate=0.1"],
            "its recipe.model.drop_path_rate is 'not giv",
        ),
    ],
)
def test_another_checkpoint_or_model_does_not_continue_the_run(
    work, undisturbed, capsys, monkeypatch, changes, message
):
    monkeypatch.chdir(work)
    shutil.copy(work / "tiny.safetensors", work / "other.safetensors")
    arguments = [*undisturbed[1], "--run-dir", undisturbed[0], *changes]
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 1 and "holds another run: " in err and message in err


def test_what_is_no_longer_asked_for_does_not_continue_the_run(
    work, undisturbed, capsys, monkeypatch
):
    monkeypatch.chdir(work)
    arguments = [x for x in undisturbed[1] if x != "dropout=0.1"]
    arguments.pop()  # its --set
    arguments += ["--run-dir", undisturbed[0]]
    code, _, err = run(capsys, monkeypatch, *arguments)
    assert code == 1 and "its recipe.model.dropout is 0.1, now it is 'not given'" in err


@pytest.mark.slow
def test_a_checkpoint_that_was_changed_does_not_continue_the_run(
    work, undisturbed, tmp_path, capsys, monkeypatch
):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    model = ViT("tiny", depth=2, num_classes=2, **SIZES)
    to_checkpoint(model, tmp_path / "tiny.safetensors")
    arguments = [*undisturbed[1], "--run-dir", "run"]
    code, _, err = run(capsys, monkeypatch, *arguments)
    was = sha256(work / "tiny.safetensors")
    assert code == 1 and f"its checkpoint.sha256 is '{was}', now it is" in err


@pytest.mark.parametrize(
    "first, second", [("mixed_bfloat16", "float32"), ("float32", "mixed_bfloat16")]
)
def test_a_model_of_one_precision_is_continued_in_another(tmp_path, first, second):
    """As `fit` builds it: inside of `training.loop.precision`."""
    recipe = find_recipe("digits").replace(**SIZES, depth=1, precision=first)
    with precision(recipe):
        model = recipe.build_model(2, ("ant", "bee"))
    assert model.get_layer("block0").dtype_policy.name == first
    model.save(tmp_path / "model.keras")
    changes = {"checkpoint": str(tmp_path / "model.keras"), "precision": second}
    recipe = recipe.replace(**changes)
    with precision(recipe):
        again = recipe.build_model(2, ("ant", "bee"))
    assert again.get_layer("block0").dtype_policy.name == second
    assert again.get_layer("block0").mlp.expand.dtype_policy.name == second
    for ours, theirs in zip(again.weights, model.weights, strict=True):
        assert ours.dtype == "float32"
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


def test_the_recipe_loads_the_weights_of_the_checkpoint(work):
    recipe = find_recipe("deit").replace(checkpoint=str(work / "tiny.safetensors"))
    model = recipe.build_model(2, ["ant", "bee"])
    expected = from_checkpoint(work / "tiny.safetensors")
    assert class_labels(expected) == ("no", "yes")
    assert class_labels(model) == ("ant", "bee")
    for ours, theirs in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))
    wider = recipe.replace(image_size=[24, 32], drop_path_rate=0.2).build_model(2)
    assert wider.input_shape == (None, 24, 32, 3)
    assert wider.get_layer("block1").drop_path.rate == 0.2


def test_a_segmentation_starts_from_the_backbone_of_a_checkpoint(tmp_path):
    backbone = CPVT("tiny", patch_size=8, embed_dim=24, depth=2, num_classes=3)
    to_checkpoint(backbone, tmp_path / "cpvt.safetensors")
    recipe = find_recipe("digits_segmentation").replace(
        checkpoint=str(tmp_path / "cpvt.safetensors"),
        segmentation={"channels": 8},
    )
    built = recipe.build_model(11, [str(i) for i in range(11)])
    assert built.output_shape == (None, None, None, 11)
    name = "block1/attention/qkv/kernel"
    ours, theirs = (
        next(to_numpy(w) for w in model.weights if w.path == name)
        for model in (built, backbone)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_directory_is_its_last_model(work):
    last = str(work / "runs/digits/last.keras")
    assert checkpoint_source(str(work / "runs/digits")) == last
    assert checkpoint_source(last) == last
    for other in ("hf:owner/name", "nowhere", str(work), str(work / "images")):
        assert checkpoint_source(other) == other
    (work / "begun").mkdir(exist_ok=True)
    (work / "begun/run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"with run.json and last.keras"):
        checkpoint_source(str(work / "begun"))


def test_a_checkpoint_is_known_by_the_bytes_of_its_files(work, tmp_path):
    file = str(work / "tiny.safetensors")
    checksum = sha256(file)
    assert checkpoint_identity(file) == {"path": file, "sha256": checksum}
    (tmp_path / "a").mkdir()
    shutil.copy(file, tmp_path / "a/model.safetensors")
    (tmp_path / "a/config.json").write_text("{}")
    (tmp_path / "a/README.md").write_text("not of the checkpoint")
    identity = checkpoint_identity(str(tmp_path / "a"))
    assert identity["sha256"].keys() == {"config.json", "model.safetensors"}
    assert identity["sha256"]["model.safetensors"] == checksum


def test_a_model_of_the_hub_is_known_by_its_revision(work, tmp_path, monkeypatch):
    """From the hub's cache, laid out as huggingface_hub does it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    commit, folder = "c" * 40, tmp_path / "models--owner--name"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    shutil.copy(work / "tiny.safetensors", snapshot / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_identity("hf:owner/name") == {
        "path": "hf:owner/name",
        "revision": commit,
    }
    recipe = find_recipe("finetune").replace(checkpoint="hf:owner/name")
    assert recipe.build_model(2).output_shape == (None, 2)
