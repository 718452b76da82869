"""The experiments as they are run: to their end, killed, with other pictures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import distillation
import lab
import numpy as np
import pytest
import record
import small_data
import where_position
from setting import Setting
from test_experiments import EXPERIMENTS, NAMES

pytestmark = [pytest.mark.first, pytest.mark.slow]


def command(name, runs, *options):
    program = [sys.executable, EXPERIMENTS / f"{name}.py", "--quick", "--runs", runs]
    return [*map(str, program), *options]


def test_killed_it_goes_on_and_leaves_no_process(tmp_path):
    arguments = command("where_position", tmp_path, "--workers", "2")
    results = tmp_path / "where_position-quick/results.csv"
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    while not results.exists() and time.monotonic() < end:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = record.read_rows(results)
    assert 0 < len(before) < 2 * len(where_position.EXPERIMENT.quick)
    while any(is_running(x) for x in children.split()) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [x for x in children.split() if is_running(x)]
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    rows = record.read_rows(results)
    assert rows[: len(before)] == before
    assert {row["arm"] for row in rows} == set(where_position.EXPERIMENT.quick)
    assert len(rows) == 2 * len(where_position.EXPERIMENT.quick)
    assert f"{len(before) // 2} are done" in again.stdout


def is_running(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_to_its_table_and_picture(name, shared_runs):
    arguments = command(name, shared_runs, "--workers", "1")
    found = subprocess.run(arguments, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "Runs and results:" in found.stdout
    folder = shared_runs / f"{name}-quick"
    table = (folder / "table.md").read_text()
    assert table in found.stdout
    assert table.count("\n|") > 5
    assert (folder / "picture.png").read_bytes()[:4] == b"\x89PNG"
    names = {x.name for x in folder.iterdir()} - {"cost.csv"}
    assert names == {"results.csv", "setting.json", "table.md", "picture.png"}


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Three of them ask the same models, which the first of them trains."""
    return tmp_path_factory.mktemp("runs")


def test_a_student_goes_on_with_the_teacher_that_is_there(tmp_path):
    """A run of two trainings, killed within the second."""
    arguments = command("distillation", tmp_path, "--workers", "1")
    process = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 300
    folder = tmp_path / "distillation-quick/soft-0"
    teacher = tmp_path / "teachers-quick/0-tensorflow.keras"
    while not (folder / "run/run.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = teacher.read_bytes()
    assert (folder / "run/run.json").exists()
    again = subprocess.run(arguments, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    rows = record.read_rows(tmp_path / "distillation-quick/results.csv")
    assert {row["arm"] for row in rows} == set(distillation.EXPERIMENT.quick)
    assert teacher.read_bytes() == before


def test_what_is_chosen_is_what_is_trained_with(tmp_path):
    """A rate that lets a run diverge is none."""
    options = ("--choose", "--rates", "0.002,1e6", "--workers", "1")
    subprocess.run(command("small_data", tmp_path, *options), check=True)
    folder = tmp_path / "small_data-quick"
    chosen = json.loads((folder / "choose/chosen.json").read_text())
    found = record.read_rows(folder / "choose/results.csv")
    assert set(chosen) == set(small_data.EXPERIMENT.quick)
    assert len(found) == 2 * len(chosen)
    for arm, rate in chosen.items():
        losses = {
            row["learning_rate"]: row["cross_entropy"]
            for row in found
            if row["arm"] == arm
        }
        assert losses[rate] == min(losses.values())
    setting = Setting(folder, suffix="-quick", scale="quick")
    assert lab._learning_rates(small_data.EXPERIMENT, setting, []) == chosen


def test_other_pictures_are_taken_in_colour(tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 40)):
        arrays[f"x_{part}"] = random.integers(0, 256, (count, 40, 30, 3), "uint8")
        arrays[f"y_{part}"] = np.arange(count) % 3
    np.savez(tmp_path / "mine.npz", **arrays)
    options = ("--workers", "1", "--data", f"arrays:{tmp_path / 'mine.npz'}")
    arguments = command("token_labeling", tmp_path / "runs", *options)
    found = subprocess.run(arguments, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_what_fails_says_why_and_where_its_log_is(tmp_path):
    options = ("--workers", "1")
    folder = tmp_path / "where_position-quick/none-0"
    folder.mkdir(parents=True)
    (folder / "run").touch()  # where the folder of the training should be
    arguments = command("where_position", tmp_path, *options)
    found = subprocess.run(arguments, capture_output=True, text=True)
    assert found.returncode == 1
    assert f"{folder / 'log.txt'} says more" in found.stderr
    arguments = command("where_position", tmp_path, "--data", "folder:nowhere")
    found = subprocess.run(arguments, capture_output=True, text=True)
    assert found.returncode == 1
    assert "There is no folder nowhere" in found.stderr
    assert "Traceback" not in found.stderr
