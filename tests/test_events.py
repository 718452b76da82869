"""The curves of a run: as TensorBoard reads them, and as a picture."""

import os
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_loop import RECIPE, ROOT, two_classes

import training
from training import events
from training.curves import COLOURS, draw_comparison, draw_run
from training.history import read_history, read_run
from training.optimize import schedule
from training.progress import Progress

SMALL = RECIPE.replace(embed_dim=12, depth=1, num_heads=2, epochs=3, batch_size=16)
SMALL = SMALL.replace(accumulation_steps=2, dropout=0.0, attention_dropout=0.0)
UPDATES = 54 // 16  # an epoch


def build():
    return SMALL.build_model(2)


def points(run_dir):
    """{tag: [(step, value), ...]} of all files, in their order."""
    found = {}

    def begun(path):  # the second, and the count of a process
        return [int(x) for x in re.findall(r"\d+", path.name)]

    for path in sorted((run_dir / "tensorboard").iterdir(), key=begun):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name in ("scalars", "")
                point = (event.step, float(tf.make_ndarray(value.tensor)))
                found.setdefault(value.tag, []).append(point)
    return found


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was cut in its third epoch, and went on."""
    data = two_classes(tmp_path_factory)
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    steps = iter(range(1000))
    update = Progress.on_train_batch_end

    def interrupt(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 2 * 2 * UPDATES + 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events, "EVERY", 1)
        with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
            inner.setattr(Progress, "on_train_batch_end", interrupt)
            training.fit(build, data, SMALL, run_dir)
        cut = points(run_dir)
        training.fit(build, data, SMALL, run_dir)
    return run_dir, cut


@pytest.mark.slow
@pytest.mark.first
def test_a_run_that_goes_on_has_every_point_once(resumed):
    run_dir, cut = resumed
    assert cut["step/loss"][-1][0] >= 2 * UPDATES  # of which the state knows nothing
    found = points(run_dir)
    for tag, curve in found.items():
        last = SMALL.epochs * (UPDATES if tag.startswith("step/") else 1)
        assert [step for step, _ in curve] == list(range(1, last + 1)), tag
    assert {"step/loss", "epoch/val_loss", "epoch/images_per_second"} <= found.keys()


@pytest.mark.slow
@pytest.mark.first
def test_the_curves_are_those_of_the_history_and_of_the_schedule(resumed):
    run_dir, _ = resumed
    found, rows = points(run_dir), read_history(run_dir)
    names = rows[0].keys() - {"epoch", "seconds"}
    assert {"loss", "val_loss", "accuracy", "learning_rate"} <= names
    for name in names:
        told = [value for _, value in found[f"epoch/{name}"]]
        np.testing.assert_allclose(told, [row[name] for row in rows], rtol=1e-6)
    rates = schedule(SMALL, UPDATES)(np.arange(SMALL.epochs * UPDATES))
    rates = keras.ops.convert_to_numpy(rates)
    told = [value for _, value in found["step/learning_rate"]]
    np.testing.assert_allclose(told, rates, rtol=1e-5, atol=1e-9)
    told = [row["learning_rate"] for row in rows]
    np.testing.assert_allclose(told, rates[UPDATES - 1 :: UPDATES], rtol=1e-5)
    losses = np.reshape([value for _, value in found["step/loss"]], (-1, UPDATES))
    means = [row["loss"] for row in rows]
    np.testing.assert_allclose(losses.mean(1), means, rtol=1e-5)
    assert np.ptp(losses[0]) > 1e-4
    told = read_run(run_dir)
    assert (told["state"], told["epochs_done"]) == ("finished", SMALL.epochs)
    assert told["best"] == max(row["val_accuracy"] for row in rows)
    assert (run_dir / "curves.png").stat().st_size > 10_000


def watch(run_dir, epochs, loss):
    """Write the curves of one-step epochs, in a process of their own as it were."""
    model = build()
    training.compile_model(model, SMALL.replace(accumulation_steps=1), UPDATES)
    model.optimizer.build(model.trainable_variables)
    model.optimizer.iterations.assign(epochs[0])
    callback = events.TensorBoard(run_dir, images_per_step=8)
    callback.set_model(model)
    for epoch in epochs:
        callback.on_epoch_begin(epoch)
        callback.on_train_batch_end(0, {"loss": loss})
        callback.on_epoch_end(epoch, {"loss": loss})
        model.optimizer.iterations.assign_add(1)
    callback.on_train_end()


@pytest.mark.heavy
@pytest.mark.first
def test_what_was_lost_is_not_there_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "EVERY", 1)
    watch(tmp_path, (0, 1, 2), 1.0)
    watch(tmp_path, (1, 2, 3), 2.0)  # killed before the state of the second was there
    files = (tmp_path / "tensorboard").iterdir()
    files = sorted(files, key=lambda path: int(path.name.split(".")[-2]))
    for number, path in enumerate(files, 9):  # the tenth of a process is after it
        start, *_, version = path.name.rsplit(".", 3)
        path.rename(path.with_name(f"{start}.1.{number}.{version}"))
    curve = [(1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    assert points(tmp_path)["epoch/loss"] == points(tmp_path)["step/loss"] == curve
    for path in list((tmp_path / "tensorboard").iterdir()):  # killed while it forgot
        shutil.copy(path, path.with_name(f"{path.name}.copy"))
    watch(tmp_path, (4,), 3.0)
    curve += [(5, 3.0)]
    assert points(tmp_path)["epoch/loss"] == points(tmp_path)["step/loss"] == curve
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.first
def test_a_torn_file_is_kept_up_to_its_tear(tmp_path):
    watch(tmp_path, (0, 1), 1.0)
    (file,) = (tmp_path / "tensorboard").iterdir()
    os.truncate(file, file.stat().st_size - 5)  # in the last point, of the rate
    watch(tmp_path, (2,), 2.0)
    found = points(tmp_path)
    assert found["epoch/loss"] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert [step for step, _ in found["epoch/images_per_second"]] == [1, 3]


FULL = """
import resource, signal, sys
from pathlib import Path
from test_events import watch
from training import events

events.EVERY = 1
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error as that of a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
try:
    watch(Path(sys.argv[1]), range(9), 1.0)
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.first
def test_a_full_disk_is_one_sentence(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-c", FULL, tmp_path],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    sentence = "could not be written (File too large); make room and run the same"
    assert f"{tmp_path / 'tensorboard'} {sentence}" in result.stdout, result.stderr


def inked(path, colour):
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(pixels - colour).sum(-1) < 60).sum()


@pytest.mark.first
@pytest.mark.parametrize("epochs", [1, 30])
def test_a_run_is_drawn_with_training_and_held_out_images(tmp_path, epochs):
    names = ("epoch", "loss", "val_loss", "accuracy", "val_accuracy", "learning_rate")
    rows = [[i + 1, 2 / (i + 1), 3 / (i + 1), 0.5, 0.4, 1e-3] for i in range(epochs)]
    lines = [names, *rows]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    (tmp_path / "history.csv").write_text(text)
    draw_run(tmp_path)
    both = [inked(tmp_path / "curves.png", colour) for colour in COLOURS[:2]]
    assert min(both) > 100
    (tmp_path / "history.csv").write_text(text.replace("val_", "other_"))
    draw_run(tmp_path)  # a run without held-out images
    assert inked(tmp_path / "curves.png", COLOURS[1]) == 0
    assert inked(tmp_path / "curves.png", COLOURS[0]) > 100


@pytest.mark.first
def test_a_comparison_has_a_colour_for_each_run(tmp_path):
    runs = {
        name: [{"epoch": i + 1.0, "val_loss": i * k, "val_accuracy": k} for i in (0, 1)]
        for k, name in enumerate(("a", "b", "c"))
    }
    path = tmp_path / "new" / "runs.png"
    draw_comparison(runs, path)
    assert min(inked(path, colour) for colour in COLOURS[:3]) > 100
    with pytest.raises(ValueError, match="No epoch of these runs is done"):
        draw_comparison({"a": [], "b": []}, path)
