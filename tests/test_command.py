"""The command line, as a person meets it: `main` in this process, once as a program."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from PIL import Image
from test_data import tiny_segmenter, write_images
from test_labels import content, flip

import training
from keras_vit import CPVT
from keras_vit import __main__ as command

QUICK = (
    "image_size=16 patch_size=8 embed_dim=24 depth=1 epochs=2 warmup_epochs=1".split()
)


def run(capsys, monkeypatch, *arguments, columns=200):
    """Exit status, output and error output of `keras-vit ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["keras-vit", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", str(columns))
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


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory):
    """A run directory of `digits_segmentation`, tiny, and what `train` printed."""
    run_dir = tmp_path_factory.mktemp("segmentation") / "run"
    changes = (
        'family=CPVT model={"patch_size":8,"embed_dim":24,"crop_ratio":null} depth=1 '
        'segmentation={"channels":8} epochs=1 warmup_epochs=0 batch_size=100'
    )
    settings = [x for change in changes.split() for x in ("--set", change)]
    arguments = ["--data", "digit_scenes:32", "--run-dir", run_dir, *settings]
    result = program("train", "digits_segmentation", *map(str, arguments))
    assert result.returncode == 0, result.stderr
    return run_dir, result.stdout


def test_train_and_export_keep_what_they_say(work):
    assert (work / "runs/digits/last.keras").is_file()
    assert (work / "models/digits/1/saved_model.pb").is_file()


def test_evaluate_prints_the_accuracy(work, capsys, monkeypatch):
    arguments = ["evaluate", work / "runs/digits", "--data", f"folder:{work}/images"]
    code, out, _ = run(capsys, monkeypatch, *arguments)
    assert code == 0 and "6 held-out images" in out and "accuracy" in out


@pytest.mark.slow
def test_train_prints_the_mean_iou_of_a_segmentation(segmentation):
    run_dir, printed = segmentation
    row = (run_dir / "history.csv").read_text().splitlines()[1].split(",")
    header = (run_dir / "history.csv").read_text().splitlines()[0].split(",")
    score = float(row[header.index("val_mean_iou")])
    assert f"held-out mean IoU {score:.4f}, pixel accuracy" in printed


@pytest.mark.slow
def test_evaluate_takes_a_segmentation_to_another_canvas(
    segmentation, tmp_path, capsys, monkeypatch
):
    model = keras.saving.load_model(segmentation[0] / "last.keras")
    expected = training.evaluate(model, training.load_data("digit_scenes:48"))
    picture = tmp_path / "new" / "scenes.png"
    arguments = ["evaluate", segmentation[0], "--data", "digit_scenes:48"]
    code, out, _ = run(capsys, monkeypatch, *arguments, "--picture", picture)
    assert code == 0 and f"Picture: {picture}" in out
    line = (
        f"300 held-out images of digit_scenes:48: mean IoU {expected['mean_iou']:.4f}"
    )
    assert line in out
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size[0] > 1000
    code, out, _ = run(capsys, monkeypatch, *arguments, "--image-size", "32x40")
    assert code == 0 and "pixel accuracy" in out and line not in out


def test_evaluate_takes_a_classifier_of_any_size_to_another(
    work, tmp_path, capsys, monkeypatch
):
    model = CPVT("tiny", embed_dim=24, depth=1, num_classes=2)
    model.save(tmp_path / "model.keras")
    images = training.load_data(f"folder:{work}/images")
    arguments = ["evaluate", tmp_path / "model.keras", "--data", images.name]
    for size in (None, (32, 32), (16, 48)):
        expected = training.evaluate(model, images, image_size=size)
        option = ["--image-size", "x".join(map(str, size))] if size else []
        code, out, _ = run(capsys, monkeypatch, *arguments, *option)
        assert code == 0 and f"loss {expected['loss']:.4f}" in out
    code, out, _ = run(capsys, monkeypatch, *arguments, "--image-size", "32")
    expected = training.evaluate(model, images, image_size=(32, 32))
    assert code == 0 and f"loss {expected['loss']:.4f}" in out


@pytest.fixture(scope="module")
def labels(work):
    """Label maps of the images, by the last model of the run, and what was printed."""
    arguments = ["--teacher", work / "runs/digits", "--data", f"folder:{work}/images"]
    options = ["--out", work / "labels", "--shard-size", 20]
    words = ["keras-vit", "annotate", *arguments, *options]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as exit_, contextlib.redirect_stdout(printed):
            command.main()
        assert not exit_.value.code
    return work / "labels", printed.getvalue()


def test_annotate_prints_what_it_wrote_and_what_is_next(labels):
    folder, printed = labels
    summary = (
        "label maps of 54 images of folder:images, 2 x 2 places, 2 of 2 classes each, "
        "by last.keras"
    )
    assert printed.splitlines() == [
        f"{folder}: {summary}",
        f"Next: keras-vit train ... --labels {folder}",
    ]
    assert len(list(folder.glob("train-*-of-00003.npz"))) == 3


def test_labels_are_checked_and_repaired(work, labels, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(labels[0], tmp_path / "labels")
    code, out, _ = run(capsys, monkeypatch, "labels", folder)
    assert code == 0 and "54 images" in out and "2 x 2 places" in out
    assert out.strip().endswith("OK")
    path = folder / "train-00001-of-00003.npz"
    flip(path)
    code, out, err = run(capsys, monkeypatch, "labels", folder)
    assert code == 1 and "OK" not in out
    assert err.strip().splitlines()[-1].startswith(f"Error: {folder} must hold the")
    assert "damaged or missing: train-00001-of-00003.npz. Delete what is damaged" in err
    path.unlink()
    code, out, err = run(capsys, monkeypatch, "labels", folder)
    assert code == 1 and "1 of 3 shards are missing. Run annotate again" in err
    data = f"folder:{work}/images"
    arguments = ["annotate", "--teacher", work / "runs/digits", "--data", data]
    options = ["--out", folder, "--shard-size", 20]
    assert run(capsys, monkeypatch, *arguments, *options)[0] == 0
    code, out, _ = run(capsys, monkeypatch, "labels", folder)
    assert code == 0 and content(folder) == content(labels[0])


def test_annotate_passes_its_options_on(work, tmp_path, capsys, monkeypatch):
    model = CPVT("tiny", embed_dim=24, depth=1, num_classes=2)
    model.save(tmp_path / "model.keras")
    arguments = [
        "--teacher",
        tmp_path / "model.keras",
        "--data",
        f"folder:{work}/images",
    ]
    options = "--image-size 32x48 --top 1 --batch-size 5 --runner DirectRunner".split()
    folder = tmp_path / "labels"
    code, out, _ = run(
        capsys, monkeypatch, "annotate", *arguments, "--out", folder, *options
    )
    assert code == 0 and "2 x 3 places, 1 of 2 classes each, by model.keras" in out
    store = training.open_labels(folder)
    assert (store.batch_size, store.shard_size, store.image_size) == (5, 512, (32, 48))


def test_train_takes_label_maps_of_its_data_alone(
    labels, tmp_path, capsys, monkeypatch
):
    """What it does with them is told by `tests/test_loop.py`."""
    write_images(tmp_path / "others", {"a": 30, "b": 31})
    arguments = ["--data", f"folder:{tmp_path}/others", "--labels", labels[0]]
    recipe = "digits_token_labeling"
    code, _, err = run(capsys, monkeypatch, "train", recipe, *arguments)
    assert code == 1 and "holds label maps of 'folder:images' (54 images, 2 cl" in err


def test_verify_prints_every_check(work, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "verify", work / "models/digits")
    assert code == 0 and "all 26 checks hold" in out and "FAILS" not in out


def test_verify_of_a_damaged_artifact_fails(work, tmp_path, capsys, monkeypatch):
    shutil.copytree(work / "models/digits/1", tmp_path / "1")
    (tmp_path / "1/variables/variables.index").unlink()
    code, out, err = run(capsys, monkeypatch, "verify", tmp_path / "1")
    assert code == 1 and "FAILS" in out and "does not hold: checksums, logits of" in err


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
        ("train digits --data digts", "must be 'digits', 'digit_scenes:SIZE', 'place"),
        ("train digits --data folder:nowhere", "There is no folder nowhere."),
        (
            "train digits --data folder:{empty}",
            "for each of at least 2 classes, got 0.",
        ),
        ("train digits --set epoch=3", "Did you mean 'epochs'?"),
        ("train digits --set epochs", "--set must be NAME=VALUE, got 'epochs'."),
        ("train digits --set epochs=-3", "epochs must be a positive int, got -3."),
        ("train digits --set depth=abc", "A value has the wrong type, of variant='t"),
        ("train digits --set image_size=8 --image-size 8", "are one; give one."),
        ("train finetune --data digits", "a checkpoint to start from: --from SOURCE"),
        ("train finetune --from {work}/runs/digits", "no data of its own: --data fol"),
        ("train digits --from nowhere", "There is no checkpoint nowhere."),
        ("train finetune --from {damaged} --data digits", "damaged or another kind."),
        ("train digits --from x --set family=CPVT", "knows its own, got 'CPVT'."),
        ("train digits --from x --set variant=base", "got 'variant'."),
        ("evaluate {work}/runs/digits --data digits --data-dir x", "leave it out."),
        ("evaluate nowhere --data digits", "There is no run directory or model file"),
        ("evaluate {damaged} --data digits", "it is damaged or another kind."),
        ("evaluate {work}/runs/digits --data digits", "one logit for each of the 10"),
        (
            "evaluate {work}/runs/digits --data digit_scenes:32",
            "logits (B, H, W, C) for masks of 'digit_scenes:32', got (None, 2).",
        ),
        (
            "evaluate {segmenter} --data digits",
            "logits (B, C) for images of 'digits', got (None, None, None, 11).",
        ),
        ("evaluate {work}/runs/digits --data {data} --image-size 32", "16 x 16 pixels"),
        ("evaluate {work}/runs/digits --data {data} --image-size 0x9", "HxW, in"),
        (
            "evaluate {work}/runs/digits --data {data} --picture x.png",
            "models that answer for each pixel or each token; this model gives one",
        ),
        ("train digits --data digit_scenes:5000", "32..256 pixels, got 5000."),
        ("predict {work}/models/digits {work}/images --label-maps x", "000_labels.png"),
        ("train digits --labels maps", "that label tokens, 'digits' labels none; add"),
        ("train digits --set family=Vit", "got 'Vit'. Did you mean 'ViT'?"),
        ("export {empty} out", "must be a run directory with run.json"),
        ("export {work}/runs/digits out --labels no.txt", "no file of labels no.txt."),
        ("verify {empty}", "must be an exported version (with saved_model.pb)"),
        ("predict {work}/models/digits nowhere.png", "no image file or folder nowhere"),
        ("predict {work}/models/digits {empty}", "contains no image (.jpg"),
        ("labels {empty}", "must be a folder of label maps, with labels.json."),
        ("labels nowhere", "There is no folder of label maps nowhere."),
        (
            "train digits_token_labeling --labels nowhere",
            "There is no folder of label maps nowhere.",
        ),
        (
            "annotate --teacher nowhere --data digits --out out",
            "no run directory or mo",
        ),
        ("annotate --teacher {damaged} --data digits --out out", "or another kind."),
        (
            "annotate --teacher {work}/runs/digits --data digits --out out",
            "must have the labels of digits, it has a, b.",
        ),
        (
            "annotate --teacher {work}/runs/digits --data {data} --out out --top 3",
            "top must be in 1..2, the teacher's classes, got 3.",
        ),
        (
            "annotate --teacher {work}/runs/digits --data {data} --out out "
            "--normalization imagenet",
            "which normalises raw pixels itself, got 'imagenet'.",
        ),
        (
            "annotate --teacher {work}/runs/digits --data {data} --out out "
            "--image-size 8x9x10",
            "--image-size must be N or HxW, in pixels, got '8x9x10'.",
        ),
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
    names = {
        "work": work,
        "data": f"folder:{work}/images",
        "segmenter": tmp_path / "segmenter.keras",
        "empty": empty,
        "damaged": damaged,
    }
    if "{segmenter}" in arguments:
        tiny_segmenter().save(names["segmenter"])
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
    names = "demo recipes show-data train annotate labels evaluate inspect convert"
    places = [result.stdout.find(f"│ {name} ") for name in names.split()]
    assert places == sorted(places) and -1 not in places
    for name in ("export", "verify", "predict"):
        assert f"│ {name} " in result.stdout
