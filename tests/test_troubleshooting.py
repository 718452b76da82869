"""Every error that docs/troubleshooting.md tells is provoked, and is as it tells."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

import keras_vit
import training
from export.batch import predict_batch
from export.client import Client
from export.precision import check_precision
from export.predict import image_files, newest_version
from export.targets import export_to
from keras_vit import CPVT, PCPVT, ViT, from_checkpoint

pytestmark = pytest.mark.first
PAGE = Path(__file__).parent.parent / "docs/troubleshooting.md"
TOLD = set(re.findall(r"```text\n(.*?)\n```", PAGE.read_text(), re.DOTALL))
RECIPES = training.RECIPES
SMALL = {"epochs": 1, "warmup_epochs": 0, "train_images": 32, "batch_size": 16}
SMALL |= {"depth": 1, "embed_dim": 16, "num_heads": 2}


def tiny(**arguments):
    return ViT("tiny", image_size=32, depth=1, num_classes=3, **arguments)


def files():
    """The files that the page's examples name, in the working directory."""
    from safetensors.numpy import load_file, save_file

    keras_vit.to_checkpoint(tiny(), "whole.safetensors", layout="timm")
    whole = Path("whole.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("flipped.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    tensors = load_file("whole.safetensors")
    save_file(tensors, "bare.safetensors")
    save_file({**tensors, "other.weight": np.zeros((3, 3))}, "more.safetensors")
    tensors.pop("norm.weight")
    save_file(tensors, "lacks.safetensors")
    for name in ("junk.npz", "broken.keras"):
        Path(name).write_bytes(b"not this")
    for name in ("empty", "photos", "bin"):
        Path(name).mkdir()
    Path("bin/tensorflow_model_server").write_text("")
    Path("bin/tensorflow_model_server").chmod(0o755)
    np.savez("photos.npz", x=np.zeros(3))


def command(*arguments):
    """What a command raises, which `main` prints after `Error:`."""
    from keras_vit.__main__ import app

    raise CliRunner().invoke(app, arguments).exception


def export(model, directory="models/digits", *arguments):
    from export import export_saved_model

    export_saved_model(model, directory, *arguments)


def fit(recipe="digits", run="runs/a", classes=10, **changes):
    recipe = RECIPES[recipe].replace(**changes)
    data = training.load_data("digits")
    training.fit(lambda: recipe.build_model(classes), data, recipe, run)


def plain_model():
    layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    return keras.Sequential(layers, name="sequential")


def floats():
    return np.zeros((20, 8, 8, 3), "float32"), np.zeros(20, int)


BUILD = [
    lambda: CPVT("smal"),
    lambda: PCPVT("small", depth=6),
    lambda: ViT("tiny", image_size=100),
    lambda: PCPVT("small", image_size=100),
    lambda: ViT("tiny", num_heads=5),
    lambda: ViT("tiny", position="sincos"),
    lambda: CPVT("tiny", peg_positions=0),
    lambda: ViT("deit_tiny_distilled", pool="mean"),
    lambda: tiny(labels=("cat", "dog")),
    lambda: keras_vit.PixelNormalization()(np.zeros((1, 8, 8, 1), "float32")),
    lambda: keras_vit.attention_maps(tiny(name="vit_tiny16"), np.zeros((32, 32, 3))),
]
LOAD = [
    lambda: from_checkpoint("vit.safetensors"),
    lambda: from_checkpoint("hf:vit"),
    lambda: from_checkpoint("empty"),
    lambda: from_checkpoint("junk.npz"),
    lambda: from_checkpoint("cut.safetensors"),
    lambda: from_checkpoint("flipped.safetensors"),
    lambda: from_checkpoint("bare.safetensors"),
    lambda: from_checkpoint("lacks.safetensors", normalization="imagenet"),
    lambda: from_checkpoint("more.safetensors", normalization="imagenet"),
    lambda: keras_vit.to_checkpoint(tiny(), "x", layout="torch"),
]
DATA = [
    lambda: training.load_data("photos"),
    lambda: training.load_data("folder:photos"),
    lambda: Path("photos").rmdir() or training.load_data("folder:photos"),
    lambda: training.load_data("arrays:photos.npz"),
    lambda: training.from_arrays(floats(), validation=0.1),
]
TRAIN = [
    lambda: RECIPES["digits"].replace(optimizer="adam"),
    lambda: RECIPES["digits"].replace(epochs=2),
    lambda: RECIPES["digits"].replace(accumulation_steps=7),
    lambda: RECIPES["finetune"].build_model(3),
    lambda: fit("deit_distilled"),
    lambda: fit(**{**SMALL, "batch_size": 64}),
    lambda: fit(classes=3, **SMALL),
    lambda: command("train", "digits", "--set", "epochs"),
    lambda: command("train", "digits", "--labels", "labels"),
    lambda: command("evaluate", "runs/none", "--data", "digits"),
]
SERVE = [
    lambda: check_precision("int8"),
    lambda: export(plain_model()),
    lambda: export(tiny(), "models/digits", ["cat", "dog"]),
    lambda: command("export", "broken.keras", "models/digits"),
    lambda: export_to(tiny(), "digits.pt"),
    lambda: newest_version(Path("models/digits")),
    lambda: serve("_docker"),
    lambda: serve("_model_server"),
    lambda: command("predict", "models/digits"),
    lambda: image_files(Path("photo.jpg")),
    lambda: image_files(Path("empty")),
    lambda: Client("localhost:8501"),
    lambda: Client("http://localhost:9", "digits").predict(["photo.jpg"]),
    lambda: predict_batch(version(), "empty", "answers.txt"),
]


def version():
    """What looks like an exported version, as long as nobody asks it."""
    directory = Path("models/batch/1")
    directory.mkdir(parents=True)
    (directory / "saved_model.pb").touch()
    return directory


def serve(how):
    from export import commands_serve

    folder = Path("models/digits")
    getattr(commands_serve, how)(folder, "digits", "0.0.0.0", 8501, 8500)


def train_twice():
    """The run is there: as another it is refused, and damaged it cannot go on."""
    fit(**SMALL)
    yield lambda: fit(**{**SMALL, "batch_size": 8})

    def damaged():
        state = bytearray(Path("runs/a/state.npz").read_bytes())
        state[len(state) // 2] ^= 1
        Path("runs/a/state.npz").write_bytes(state)
        fit(**SMALL)

    yield damaged


def provoke(attempts):
    """What each of them says."""
    said = []
    for attempt in attempts:
        with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
            attempt()
        said.append(str(caught.value))
    return said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_every_error_of_the_page_is_as_it_tells(folder):
    said = provoke([*BUILD, *LOAD, *DATA, *TRAIN, *SERVE, *train_twice()])
    assert len(said) > 40
    assert set(said) == TOLD
