import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_loop import RECIPE, ROOT, build, two_classes
from test_state import flipped, weights_in

import training
from training.progress import Progress
from training.state import find_state, read_state

FILES = [
    *("best.keras", "curves.png", "history.csv", "last.keras", "run.json"),
    *("state.npz", "state.previous.npz", "tensorboard"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory)


def state(model):
    return {
        f"{i} {v.path}": to_numpy(v.value)
        for i, v in enumerate([*model.variables, *model.optimizer.variables])
    }


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return run_dir, state(training.fit(build, data, RECIPE, run_dir))


def rows_of(run_dir):
    with (run_dir / "history.csv").open() as file:
        return list(csv.DictReader(file))


def check_same_end(run_dir, expected_dir):
    """Every variable and the history are those of the other run, bit for bit."""
    final, expected = (read_state(x / "state.npz") for x in (run_dir, expected_dir))
    assert final[1].keys() == expected[1].keys()
    for key, value in final[1].items():
        np.testing.assert_array_equal(value, expected[1][key], err_msg=key)
    histories = [
        [*place.history, *rows_of(x)]
        for place, x in ((final[0], run_dir), (expected[0], expected_dir))
    ]
    for row, other in zip(*histories, strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    assert sorted(path.name for path in run_dir.iterdir()) == FILES
    for name in ("last.keras", "best.keras"):
        weights, others = (weights_in(x / name) for x in (run_dir, expected_dir))
        assert weights.keys() == others.keys() and len(weights) > 10
        for key, value in weights.items():
            np.testing.assert_array_equal(value, others[key], err_msg=key)


@pytest.mark.heavy
@pytest.mark.first
def test_a_run_directory_says_everything(data, undisturbed):
    run_dir, _ = undisturbed
    assert sorted(path.name for path in run_dir.iterdir()) == FILES
    run = json.loads((run_dir / "run.json").read_text())
    assert run["recipe"]["learning_rate"] == RECIPE.learning_rate
    assert run["recipe"]["seed"] == 0 and run["labels"] == ["a", "b"]
    assert run["data"]["fingerprint"] == data.fingerprint
    assert run["backend"] == keras.backend.backend()
    assert {"keras", "tensorflow", "numpy", "python"} <= set(run["versions"])
    assert run["preprocess"]["image_size"] == [16, 16]
    rows = rows_of(run_dir)
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    told = {"loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "seconds"}
    assert told <= set(rows[0])


@pytest.mark.heavy
@pytest.mark.first
def test_last_model_is_the_one_that_was_returned(undisturbed):
    run_dir, final = undisturbed
    last = keras.saving.load_model(run_dir / "last.keras")
    kernel = next(x for key, x in final.items() if key.endswith("head/kernel"))
    np.testing.assert_array_equal(to_numpy(last.get_layer("head").kernel), kernel)
    assert getattr(last, "optimizer", None) is None


KILLED = """
import os, signal, sys
import training
from training import progress, state
from test_loop import RECIPE, build

when, steps = sys.argv[3], iter(range(1, 1000))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "training":  # in the middle of the third epoch
    update = progress.Progress.on_train_batch_end
    def on_train_batch_end(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 16:
            die()
    progress.Progress.on_train_batch_end = on_train_batch_end
else:  # while the state of the second epoch is written
    savez = state.np.savez
    def half(path, **arrays):
        savez(path, **arrays)
        if next(steps) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    state.np.savez = half
training.fit(build, training.load_data(sys.argv[1]), RECIPE, sys.argv[2])
"""


@pytest.mark.heavy
@pytest.mark.first
@pytest.mark.parametrize(
    "when, done",
    [("training", 2), pytest.param("writing", 1, marks=pytest.mark.slow)],
)
def test_killed_and_run_again_it_ends_as_if_undisturbed(
    data, undisturbed, tmp_path, when, done
):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_dir = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, data.name, str(run_dir), when],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    with np.load(run_dir / "state.npz") as file:
        assert len(json.loads(str(file["history"]))) == done
    for name in map(Path, FILES):  # as of kills while these were written
        (run_dir / f".{name.stem}.12345{name.suffix}").touch()
    model = training.fit(build, data, RECIPE, run_dir)
    assert int(model.optimizer.iterations) == 4 * (54 // 8)
    seeds = [key for key in state(model) if "seed_generator" in key]
    assert len(seeds) >= 8
    check_same_end(run_dir, undisturbed[0])


FORKING = """
import json, os, sys, threading, time
from pathlib import Path
import numpy as np
import tensorflow as tf
import training
from test_checkpoints import SHORT
from test_loop import build

# What takes seconds is imported once; each run has a fork of this process. That starts
# no backend: JAX and TensorFlow have threads then, which a fork would not have.
images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), "uint8")
data = training.from_arrays((images, np.arange(60) % 2))
fit = tf.autograph.experimental.do_not_convert(training.fit)  # half of a run's time


def end(child, ended, first, seconds, number):
    while not (first is None or Path(first).exists() or ended.wait(0.001)):
        pass
    if not ended.wait(seconds):
        os.kill(child, number)


for line in sys.stdin:
    run_dir, first, seconds, number = json.loads(line)
    started, ended = time.monotonic(), threading.Event()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            fit(lambda: build(SHORT), data, SHORT, run_dir)
            status = 0
        except SystemExit as error:
            status = error.code
        finally:
            os._exit(status)
    killer = threading.Thread(target=end, args=(child, ended, first, seconds, number))
    killer.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ended.set()
    killer.join()
    print(json.dumps([status, time.monotonic() - started]), flush=True)
"""
SHORT = RECIPE.replace(
    depth=1,
    epochs=3,
    batch_size=16,
    ema=0.9,
    accumulation_steps=2,
    layer_decay=0.7,
    mixup=0.2,
    random_affine=None,
)
ENDED = {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {-signal.SIGTERM, 143}}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """A function that runs `SHORT`, and ends it `seconds` after its start.

    With `first` they count from the moment when that file of the run is there.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    quick = {
        "OMP_NUM_THREADS": "1",  # PyTorch's threads wait for each other by spinning
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        env={**os.environ, **quick, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(run_dir, seconds=None, number=signal.SIGKILL, first=None):
        order = json.dumps(
            [str(run_dir), first and str(run_dir / first), seconds, number]
        )
        print(order, file=server.stdin, flush=True)
        return json.loads(server.stdout.readline())

    yield run
    server.stdin.close()
    assert server.wait() == 0


@pytest.fixture(scope="module")
def short(forks, tmp_path_factory):
    """An undisturbed run of `SHORT`, and how long it takes once files are warm."""
    folder = tmp_path_factory.mktemp("short")
    assert forks(folder / "first")[0] == 0
    status, seconds = forks(folder / "second")
    assert status == 0
    check_same_end(folder / "second", folder / "first")
    return folder / "first", seconds


# How often; less where this backend runs beside another that does it so often.
KILLS, STOPS = (6, 3) if os.environ.get("KERAS_VIT_ONE_BACKEND") == "1" else (20, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, count", [(signal.SIGKILL, KILLS), (signal.SIGTERM, STOPS)]
)
def test_killed_at_any_moment_it_ends_as_if_undisturbed(
    forks, short, tmp_path, number, count
):
    expected, seconds = short
    moments = np.random.default_rng(0).uniform(0, seconds, count)
    found = []
    for i, moment in enumerate(moments):
        # Every other moment counts from the first state on: however long the start of
        # a busy machine takes, some runs have saved something, and some nothing.
        first = "state.npz" if i % 2 else None
        run_dir, status = tmp_path / f"{i}", 0
        while status == 0:  # it ended before: again, and earlier
            shutil.rmtree(run_dir, ignore_errors=True)
            status, _ = forks(run_dir, moment, number, first)
            moment *= 0.5 if first else 0.8
        assert status in ENDED[number]
        there = (run_dir / "run.json").exists()
        path, _ = find_state(run_dir) if there else (None, "")
        found.append(str(read_state(path)[0]) if path else "nothing")
        assert path or not first
        assert forks(run_dir)[0] == 0
        check_same_end(run_dir, expected)
    print(f"what {count} runs had saved: {', '.join(found)}")
    assert len(set(found)) > 1


@pytest.mark.heavy
@pytest.mark.first
def test_with_a_damaged_state_it_goes_on_from_the_one_before(
    data, undisturbed, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[0], run_dir)
    flipped(run_dir / "state.npz", 9000)
    training.fit(build, data, RECIPE, run_dir)
    said = capsys.readouterr().err
    assert "state.npz: its content does not have its checksum; the run goes on" in said
    assert "from state.previous.npz, epoch 3.\n" in said
    check_same_end(run_dir, undisturbed[0])
    again = read_state(run_dir / "state.previous.npz")[0]
    assert again.epochs == 3  # not the damaged one


def at_step(monkeypatch, number, do):
    """In the `number`-th step of what is trained from now on, do something."""
    update, steps = Progress.on_train_batch_end, iter(range(1, 1000))

    def on_train_batch_end(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == number:
            do()

    monkeypatch.setattr(Progress, "on_train_batch_end", on_train_batch_end)


@pytest.mark.heavy
@pytest.mark.first
def test_sigterm_saves_within_the_epoch_and_the_run_goes_on_at_the_next_step(
    data, undisturbed, tmp_path, capsys, monkeypatch
):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        at_step(patch, 14, lambda: os.kill(os.getpid(), signal.SIGTERM))
        training.fit(build, data, RECIPE, tmp_path)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert (
        "SIGTERM: the run was saved in the middle of epoch 3 after step 3 of 6; run "
        "the same command again to go on."
    ) in capsys.readouterr().err
    kept = read_state(tmp_path / "state.npz")[0]
    assert (kept.epochs, kept.step) == (2, 3)
    seen = []
    with monkeypatch.context() as patch:
        update = Progress.on_train_batch_end

        def on_train_batch_end(self, batch, logs=None):
            update(self, batch, logs)
            seen.append((self.epoch, batch, self.bar.n, self.bar.total))

        patch.setattr(Progress, "on_train_batch_end", on_train_batch_end)
        training.fit(build, data, RECIPE, tmp_path)
    steps = [(2, 3), (2, 4), (2, 5), *((3, step) for step in range(6))]
    assert [x[:2] for x in seen] == steps
    assert [x[2:] for x in seen] == [(n * 8, 192) for n in range(16, 25)]  # one bar
    check_same_end(tmp_path, undisturbed[0])


@pytest.mark.slow
@pytest.mark.first
@pytest.mark.parametrize("name", ["state.npz", "last.keras"])
def test_a_full_disk_is_one_sentence_and_with_room_the_run_goes_on(
    data, undisturbed, tmp_path, monkeypatch, name
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (undisturbed[0] / name).stat().st_size

    def fill():  # from here on no file may be as large as this one
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))

    message = (
        rf"{name} could not be written \(File too large\): it takes [\d.]+ MB, and "
        r"[\d,.]+ MB are free. The checkpoint of epoch 2 is intact; make room"
    )
    try:
        with monkeypatch.context() as patch, pytest.raises(OSError, match=message):
            at_step(patch, 14, fill)
            training.fit(build, data, RECIPE, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted({*FILES} - {"curves.png"})
    assert read_state(find_state(tmp_path)[0])[0].epochs == 2
    training.fit(build, data, RECIPE, tmp_path)
    check_same_end(tmp_path, undisturbed[0])


@pytest.mark.heavy
def test_a_finished_run_is_not_trained_again(data, undisturbed):
    run_dir, final = undisturbed
    before = (run_dir / "state.npz").stat().st_mtime_ns
    again = state(training.fit(build, data, RECIPE, run_dir))
    assert (run_dir / "state.npz").stat().st_mtime_ns == before
    for value, expected in zip(again.values(), final.values(), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.first
def test_another_recipe_does_not_continue_the_run(data, undisturbed):
    other = RECIPE.replace(learning_rate=0.5)
    with pytest.raises(ValueError, match=r"its recipe.learning_rate is 0.002, now"):
        training.fit(build, data, other, undisturbed[0])
