"""The command line, as a person meets it: `main` in this process, once as a program."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import write_images

from keras_vit import __main__ as command

QUICK = (
    "image_size=16 patch_size=8 embed_dim=24 depth=1 epochs=2 warmup_epochs=1".split()
)


def run(capsys, monkeypatch, *arguments):
    """Exit status, output and error output of `keras-vit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["keras-vit", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit_:
        command.main()
        sys.exit(0)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder of images, a run on it and its export, all by the command line."""
    folder = tmp_path_factory.mktemp("work")
    images = write_images(folder / "images", {"a": 30, "b": 30})
    settings = [x for change in (*QUICK, "batch_size=8") for x in ("--set", change)]
    before = Path.cwd()
    os.chdir(folder)
    try:
        for arguments in (
            ["train", "digits", "--data", f"folder:{images}", *settings],
            ["export", "runs/digits", "models/digits"],
        ):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["keras-vit", *arguments])
                with pytest.raises(SystemExit) as exit_:
                    command.main()
                assert not exit_.value.code
    finally:
        os.chdir(before)
    return folder


def test_train_and_export_keep_what_they_say(work):
    assert (work / "runs/digits/last.keras").is_file()
    assert (work / "models/digits/1/saved_model.pb").is_file()


def test_evaluate_prints_the_accuracy(work, capsys, monkeypatch):
    arguments = ["evaluate", work / "runs/digits", "--data", f"folder:{work}/images"]
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0 and "6 held-out images" in out and "accuracy" in out


def test_verify_prints_every_check(work, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "verify", work / "models/digits")
    assert code == 0 and "all 24 checks hold" in out and "FAILS" not in out


def test_verify_of_a_damaged_artifact_fails(work, tmp_path, capsys, monkeypatch):
    shutil.copytree(work / "models/digits/1", tmp_path / "1")
    (tmp_path / "1/variables/variables.index").unlink()
    code, out, err = run(capsys, monkeypatch, "verify", tmp_path / "1")
    assert code == 1 and "FAILS" in out and "does not hold: logits of" in err


def test_predict_prints_a_table_of_classes(work, capsys, monkeypatch):
    file = work / "images/a/000.png"
    arguments = ["predict", work / "models/digits", file, "--top", "2"]
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0 and "000.png" in out and "a " in out and "%" in out


def test_predict_names_the_damaged_file_and_answers_the_rest(
    work, tmp_path, capsys, monkeypatch
):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    good = work / "images/a/000.png"
    code, out, err = run(
        capsys, monkeypatch, "predict", work / "models/digits/1", tmp_path, good
    )
    assert code == 1 and "000.png" in out
    assert err.strip().endswith("it could not be decoded.") and "bad.png" in err


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("train digit", "got 'digit'. Did you mean 'digits'?"),
        ("train digits --data digts", "must be 'digits', 'digit_scenes:SIZE', 'tfds"),
        ("train digits --data folder:nowhere", "There is no folder nowhere."),
        (
            "train digits --data folder:{empty}",
            "for each of at least 2 classes, got 0.",
        ),
        ("train digits --set epoch=3", "Did you mean 'epochs'?"),
        ("train digits --set epochs", "--set must be NAME=VALUE, got 'epochs'."),
        ("train digits --set epochs=-3", "epochs must be a positive int, got -3."),
        ("evaluate nowhere --data digits", "There is no run directory or model file"),
        ("evaluate {damaged} --data digits", "it is damaged or another kind."),
        ("evaluate {work}/runs/digits --data digits", "one logit for each of the 10"),
        ("export {empty} out", "must be a run directory with run.json"),
        ("export {work}/runs/digits out --labels no.txt", "no file of labels no.txt."),
        ("verify {empty}", "must be an exported version (with saved_model.pb)"),
        ("predict {work}/models/digits nowhere.png", "no image file or folder nowhere"),
        ("predict {work}/models/digits {empty}", "contains no image (.jpg"),
        ("predict {empty} {work}/images/a/000.png", "must be an exported version"),
    ],
)
def test_a_wrong_input_is_one_sentence(
    work, tmp_path, capsys, monkeypatch, arguments, sentence
):
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged.keras"
    whole = (work / "runs/digits/last.keras").read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    names = {"work": work, "empty": empty, "damaged": damaged}
    monkeypatch.chdir(tmp_path)
    words = [word.format(**names) for word in arguments.split()]
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def program(*arguments, **kwargs):
    path = Path(sys.executable).with_name("keras-vit")
    return subprocess.run([path, *arguments], capture_output=True, text=True, **kwargs)


def test_the_program_helps_without_loading_keras(tmp_path):
    (tmp_path / "keras.py").write_text("raise SystemExit('keras was imported')")
    result = program("--help", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("demo", "train", "evaluate", "export", "verify", "predict"):
        assert name in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_demo(tmp_path, backend):
    """The README's first command, on each backend that is installed."""
    pytest.importorskip(backend, reason="this backend is not installed")
    environment = {**os.environ, "KERAS_BACKEND": backend}
    result = program("demo", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.strip().splitlines()
    accuracy = float(lines[-2].rsplit(":", 1)[1].strip(" %"))
    assert "360 held-out images" in lines[-2] and accuracy >= 97
    assert lines[-1] == "Artifact verified: 24 of 24 checks hold."
    assert (tmp_path / "keras-vit-demo/predictions.png").stat().st_size > 10_000
