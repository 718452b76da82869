"""The commands that look at what was trained: `evaluate` and `runs`."""

import csv
import json
import os

import keras
import pytest
from PIL import Image
from test_command import program, run
from test_data import write_images
from test_history import write_run
from test_loop import ROOT

import training
from keras_vit import ViT

FEW = {"image_size": 16, "patch_size": 8, "embed_dim": 12, "num_heads": 2, "depth": 1}


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory):
    """A model of twelve classes, and a folder of their images."""
    folder = tmp_path_factory.mktemp("many")
    write_images(folder / "images", {f"animal{i:02d}": 10 for i in range(12)})
    ViT("tiny", num_classes=12, **FEW).save(folder / "model.keras")
    return folder / "model.keras", f"folder:{folder}/images"


def test_evaluate_shows_the_worst_classes_and_says_where_the_others_are(
    many_classes, capsys, monkeypatch
):
    model, data = many_classes
    words = ["evaluate", model, "--data", data]
    code, out, _ = run(capsys, monkeypatch, *words, columns=80)
    assert code == 0 and max(map(len, out.splitlines()[:-2])) <= 80
    assert out.count(" animal") >= 10 and "…" not in out
    assert "The 10 of 12 classes with the lowest recall; --out DIR writes all" in out
    assert "12 held-out images of folder:" in out
    for word in ("accuracy", "top-5", "loss", "calibration error"):
        assert f" {word} " in out.splitlines()[-1]


def test_evaluate_writes_a_report(many_classes, tmp_path, capsys, monkeypatch):
    model, data = many_classes
    folder = tmp_path / "new" / "report"
    words = ["evaluate", model, "--data", data, "--out", folder]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and f"Written: {folder / 'classes.csv'}" in out
    content = json.loads((folder / "report.json").read_text())
    network = keras.saving.load_model(model)
    expected = training.evaluate(network, training.load_data(data))
    for name, value in expected.items():
        assert content[name] == pytest.approx(value)
    assert content["data"] == data and content["model"] == str(model)
    with (folder / "classes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 12
    for name in ("confusion.png", "calibration.png"):
        with Image.open(folder / name) as image:
            assert image.format == "PNG"
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run(capsys, monkeypatch, *words[:-1], file)
    assert code == 1 and "Traceback" not in err and str(file) in err


@pytest.fixture
def three_runs(tmp_path):
    """A finished run, one that goes on, and one that is damaged."""
    folder = tmp_path / "runs"
    write_run(folder / "a_rather_long_name_of_a_run", (0.5, 0.75, 0.7))
    write_run(folder / "b", (0.8,), learning_rate=0.1)
    damaged = write_run(folder / "c", (0.6,))
    (damaged / "state.npz").write_bytes(b"")
    return folder


def test_runs_are_a_table_in_80_columns(three_runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, monkeypatch, "runs", columns=80)
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert out.index(" b ") < out.index(" a_rather_long") < out.index(" c ")
    for word in ("digits, finished", "3/3", "75.00%", "2 min", "data: digits"):
        assert word in out
    assert "Unfinished: run the same command again to go on." in out
    assert "Damaged: runs/c: state.npz is missing or not whole." in out
    code, out, _ = run(capsys, monkeypatch, "runs", "--json")
    states = [(x["run"], x["state"]) for x in json.loads(out)]
    assert states[0] == ("runs/b", "unfinished") and states[2][1] == "damaged"


def test_runs_compares_two(three_runs, tmp_path, capsys, monkeypatch):
    picture = tmp_path / "new" / "curves.png"
    words = ["runs", *sorted(three_runs.iterdir()), "--picture", picture]
    code, out, _ = run(capsys, monkeypatch, *words, columns=80)
    assert code == 0 and max(map(len, out.splitlines()[:-2])) <= 80
    (row,) = [x for x in out.splitlines() if "learning_rate" in x]
    cells = [x.strip() for x in row.strip("│").split("│")]
    assert cells[1:] == ["0.001", "0.1", "0.001"]
    assert "recipe.epochs" not in out and "80.00%" in out
    assert "state.npz is missing or not whole." in out
    assert f"Picture: {picture}" in out
    with Image.open(picture) as image:
        assert image.format == "PNG"
    code, out, _ = run(capsys, monkeypatch, *words[:3], "--json")
    told = json.loads(out)
    assert told["differences"] == {"recipe.learning_rate": [0.001, 0.1]}
    assert [x["best"] for x in told["runs"]] == [0.75, 0.8]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("runs", "There is no folder of runs runs."),
        ("runs a", "There is no folder of runs a."),
        ("runs . .", ". must be a run directory: run.json cannot be read"),
        ("runs . --picture x.png", "--picture compares runs: keras-vit runs RUN RUN"),
        ("runs . . --picture x.pdf", "A picture must end in .png, got 'x.pdf'."),
    ],
)
def test_a_wrong_input_is_one_sentence(
    tmp_path, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *arguments.split())
    assert code == 1 and err.startswith("Error: ") and sentence in err
    assert len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_runs_waits_for_no_keras(three_runs, tmp_path):
    for name in ("keras", "tensorflow"):
        code = f"raise SystemExit('{name} was imported')"
        (tmp_path / f"{name}.py").write_text(code)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    result = program("runs", str(three_runs), env=environment)
    assert result.returncode == 0 and "a_rather" in result.stdout, result.stderr
