import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from test_command import run

from export import export_saved_model
from export.batch import Predictor, predict_batch
from export.batch_source import open_source
from export.predict import predict_files
from keras_vit import ViT

pytestmark = pytest.mark.first
LABELS = ("cat", "dog", "émeu", "yak")
SMALL = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2}


def export(model, folder):
    draw = np.random.default_rng(1)
    for variable in model.trainable_weights:
        variable.assign(draw.normal(0, 0.3, variable.shape))
    return export_saved_model(model, folder, progress=False)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    model = ViT("tiny", image_size=16, num_classes=4, labels=LABELS, **SMALL)
    return export(model, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine images in two folders, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    draw = np.random.default_rng(0)
    for i in range(9):
        pixels = draw.integers(0, 256, (12 + i, 20, 3), "uint8")
        place = folder / "more" if i % 2 else folder
        Image.fromarray(pixels).save(place / f"{i}.png")
    (folder / "more/2.jpg").write_bytes(b"garbage")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_says_what_predict_says_of_each_file(artifact, photos, tmp_path):
    written = predict_batch(
        artifact, photos, tmp_path / "all.csv", shard_size=4, progress=False
    )
    assert (written.images, written.damaged) == (11, 2)
    rows = read(written.out)
    files = sorted(x for x in photos.rglob("*") if x.suffix in (".png", ".jpg"))
    assert [row["file"] for row in rows] == [str(x) for x in files]
    answers = [answer for _, answer in predict_files(artifact, files, top=4)]
    for row, answer in zip(rows, answers, strict=True):
        told = [(row[f"class{i}"], row[f"score{i}"]) for i in range(1, 5)]
        if answer is None:
            assert row["valid"] == "false" and row["error"]
            assert told == [("", "")] * 4
        else:
            assert row["valid"] == "true" and not row["error"]
            assert [f"{name} {float(score):.1%}" for name, score in told] == answer
    assert list(tmp_path.iterdir()) == [written.out]


def test_lines_and_parquet_hold_the_same(
    artifact, photos, tmp_path, capsys, monkeypatch
):
    pattern = f"{photos}/**/*"
    lines, out = tmp_path / "table.jsonl", tmp_path / "table.parquet"
    predict_batch(artifact.parent, pattern, lines, top=2, progress=False)
    arguments = ["predict-batch", artifact, pattern, out, "--top", 2]
    arguments += ["--beam", "job_name=table"]
    status, told, _ = run(capsys, monkeypatch, *arguments)
    assert (status, told) == (0, f"11 images, 2 damaged: {out}\n")
    lines = (tmp_path / "table.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    columns = ["file", "valid", "class1", "score1", "class2", "score2", "error"]
    assert len(rows) == 11 and list(rows[0]) == columns
    table = parquet.read_table(tmp_path / "table.parquet")
    assert [str(field.type) for field in table.schema] == [
        *("string", "bool", "string", "float", "string", "float", "string")
    ]
    for row, told in zip(rows, table.to_pylist(), strict=True):
        for i in (1, 2):  # a float32, in JSON by as few digits as tell it
            if row["valid"]:
                told[f"score{i}"] = float(str(np.float32(told[f"score{i}"])))
        assert told == row
    assert sum(row["valid"] for row in rows) == 9


def test_a_name_that_is_no_utf_8_is_an_image_like_others(artifact, photos, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(name)).write_bytes((photos / "0.png").read_bytes())
    (tmp_path / "link.png").symlink_to(photos / "0.png")
    source = open_source(str(tmp_path))
    before = source.fingerprint()
    written = predict_batch(artifact, tmp_path, tmp_path / "a.csv", progress=False)
    assert [row["valid"] for row in read(written.out)] == ["true", "true"]
    assert read(written.out)[0]["file"].endswith("caf\ufffd.png")
    os.utime(photos / "0.png", (1, 1))  # what the link leads to is another now
    assert source.fingerprint() != before


def test_a_runtime_that_died_is_opened_again(artifact, photos):
    images = open_source(str(photos / "0.png"))
    with Predictor(artifact) as predictor:
        (before,) = predictor.rows(images)
        predictor.runtime._process.kill()
        (during,) = predictor.rows(images)
        (after,) = predictor.rows(images)
    assert before["valid"] and before == after
    assert not during["valid"] and "died with SIGKILL" in during["error"]


def test_what_is_no_job_is_refused(artifact, photos, tmp_path):
    out = tmp_path / "a.csv"
    with pytest.raises(ValueError, match=r"must end in .csv, .jsonl, .parquet, got"):
        predict_batch(artifact, photos, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="top must be a positive int, got 0"):
        predict_batch(artifact, photos, out, top=0)
    with pytest.raises(FileNotFoundError, match=r"matches no image"):
        predict_batch(artifact, f"{photos}/*.gif", out)
    with pytest.raises(FileNotFoundError, match="contains no image"):
        predict_batch(artifact, tmp_path, out)
    with pytest.raises(FileNotFoundError, match="must be an exported version"):
        predict_batch(tmp_path, photos, out)
    with pytest.raises(ValueError, match="tfds:NAME/SPLIT, got 'tfds:digits'"):
        predict_batch(artifact, "tfds:digits", out)
    out.touch()
    with pytest.raises(FileExistsError, match="is there already"):
        predict_batch(artifact, photos, out)
    assert list(tmp_path.iterdir()) == [out]


KILLED = """
import sys
from export.batch import predict_batch

predict_batch(*sys.argv[1:], shard_size=1, progress=False)
"""


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_with_what_is_missing(artifact, photos, tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out.csv"
    source.mkdir()
    for i in range(80):
        (source / f"{i:02}.png").write_bytes((photos / f"{i % 5 * 2}.png").read_bytes())
    command = [sys.executable, "-c", KILLED, artifact, source, out]
    job = subprocess.Popen(command, start_new_session=True)
    parts = tmp_path / "out.csv.parts"
    while len(list(parts.glob("0*.jsonl"))) < 3:
        assert job.poll() is None
        time.sleep(0.002)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    done = sorted(parts.glob("0*.jsonl"))
    assert 3 <= len(done) < 80 and not out.exists()
    with pytest.raises(ValueError, match="another job, with another shard_size"):
        predict_batch(artifact, source, out, shard_size=2)
    done[1].write_text(done[1].read_text().replace("01.png", "kept.png"))
    predict_batch(artifact, source, out, shard_size=1, progress=False)
    names = [Path(row["file"]).stem for row in read(out)]
    assert names == [f"{i:02}" if i != 1 else "kept" for i in range(80)]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["out.csv", "photos"]


@pytest.mark.slow
def test_a_split_is_answered_from_its_stored_images(artifact, tmp_path):
    from training.digits import HandwrittenDigits, read_digits

    builder = HandwrittenDigits(data_dir=tmp_path / "data")
    builder.download_and_prepare()
    source = open_source(f"tfds:{builder.name}/test", tmp_path / "data")
    assert len(source) == 360
    images, _ = read_digits()["test"]
    rows = list(source.part(100, 104).read())
    assert [name for name, _ in rows] == [
        f"{builder.name}/test/{i}" for i in range(100, 104)
    ]
    for (_, data), image in zip(rows, images[100:104], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    out = tmp_path / "digits.csv"
    written = predict_batch(
        artifact,
        f"tfds:{builder.name}/test",
        out,
        shard_size=50,
        data_dir=tmp_path / "data",
        progress=False,
    )
    assert (written.images, written.damaged) == (360, 0)
    Image.fromarray(images[359]).save(tmp_path / "last.png")
    ((_, answer),) = predict_files(artifact, [tmp_path / "last.png"], top=1)
    last = read(out)[-1]
    assert last["file"] == f"{builder.name}/test/359"
    assert f"{last['class1']} {float(last['score1']):.1%}" == answer[0]
    with pytest.raises(ValueError, match="has the splits test, train, got 'nothing'"):
        open_source(f"tfds:{builder.name}/nothing", tmp_path / "data")


def test_label_maps_are_told_by_the_shares_of_their_classes(tmp_path):
    """Of an artifact that answers with label maps, and says which rows are valid."""
    import tensorflow as tf

    class Maps(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
        def maps(self, image_bytes):
            """A red of 50 to 99 is class 1, and so on; no file is no answer."""

            def label_map(data):
                red = tf.io.decode_png(data)[..., :1]
                return tf.io.encode_png(red // 50)

            valid = tf.strings.length(image_bytes) > 0
            maps = tf.map_fn(
                lambda x: tf.cond(x[1], lambda: label_map(x[0]), lambda: b""),
                (image_bytes, valid),
                fn_output_signature=tf.string,
            )
            return {"label_map_bytes": maps, "valid": valid}

    model = Maps()
    tf.saved_model.save(model, tmp_path / "1", {"serving_default": model.maps})
    (tmp_path / "1/assets.extra").mkdir()
    manifest = json.dumps({"labels": ["sky", "sea", "sand"], "batch_sizes": [1, 2]})
    (tmp_path / "1/assets.extra/manifest.json").write_text(manifest)
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.full((4, 5, 3), 120, "uint8")
    pixels[0] = 60
    Image.fromarray(pixels).save(photos / "a.png")
    (photos / "b.png").touch()
    Image.fromarray(pixels[:2]).save(photos / "c.png")
    predict_batch(tmp_path / "1", photos, tmp_path / "o.csv", top=2, progress=False)
    rows = [list(row.values())[1:] for row in read(tmp_path / "o.csv")]
    assert rows == [
        ["true", "sand", "0.75", "sea", "0.25", ""],
        ["false", "", "", "", "", "it could not be decoded, or is too large"],
        ["true", "sea", "0.5", "sand", "0.5", ""],
    ]
