"""What run directories say of their runs, whatever they hold."""

import csv
import json
import os
import zipfile

import pytest

from training.history import differences, find_runs, read_history, read_run

pytestmark = pytest.mark.first  # no backend has a part in it


def write_run(run_dir, scores=(), *, epochs=3, score="val_accuracy", **changes):
    """A directory as `training.fit` leaves it after `len(scores)` epochs."""
    run_dir.mkdir(parents=True)
    recipe = {"name": "digits", "epochs": epochs, "learning_rate": 1e-3, "model": {}}
    run = {"recipe": recipe | changes, "data": {"name": "digits"}, "backend": "jax"}
    (run_dir / "run.json").write_text(json.dumps(run))
    if scores:
        for name in ("last.keras", "state.npz"):
            with zipfile.ZipFile(run_dir / name, "w") as file:
                file.writestr("x", "y")
        with (run_dir / "history.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["epoch", "loss", "val_loss", score, "seconds"])
            rows.writerows([i + 1, 2 - i, 3 - i, x, 30.5] for i, x in enumerate(scores))
    return run_dir


def test_a_run_tells_how_far_it_came(tmp_path):
    told = read_run(write_run(tmp_path / "a", (0.5, 0.75, 0.7)))
    assert told.pop("last_written").startswith("20")
    assert told == {
        "run": str(tmp_path / "a"),
        **{"recipe": "digits", "data": "digits", "epochs": 3, "epochs_done": 3},
        **{"score": "val_accuracy", "best": 0.75, "best_epoch": 2, "last_loss": 0.0},
        **{"seconds": 91.5, "state": "finished", "reason": None},
    }
    told = read_run(write_run(tmp_path / "b", (0.5,), score="val_mean_iou"))
    assert (told["state"], told["score"]) == ("unfinished", "val_mean_iou")
    told = read_run(write_run(tmp_path / "c"))
    assert (told["state"], told["epochs_done"], told["best"]) == ("unfinished", 0, None)


def test_a_previous_state_is_enough_to_go_on(tmp_path):
    run_dir = write_run(tmp_path / "a", (0.5,))
    (run_dir / "state.npz").rename(run_dir / "state.previous.npz")
    assert read_run(run_dir)["state"] == "unfinished"


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("run.json", b"{", "run.json cannot be read"),
        ("run.json", b"\xff\xfe", "run.json cannot be read"),
        ("run.json", b"[1]", "not that of a run of keras-vit"),
        ("run.json", b'{"recipe": 3, "data": {"name": "x"}}', "not that of a run"),
        ("run.json", b'{"recipe": {"name": []}, "data": {}}', "not that of a run"),
        ("history.csv", b"epoch,loss\n1,abc\n", "history.csv is damaged"),
        ("history.csv", b"epoch,loss\n1,2,3\n", "history.csv is damaged"),
        ("history.csv", b"loss\n1\n", "a row without its epoch"),
        ("history.csv", b"epoch\ninf\n", "a row without its epoch"),
        ("history.csv", b"\x00\xff", "history.csv is damaged"),
        ("state.npz", b"PK", "state.npz is missing or not whole"),
        ("last.keras", None, "last.keras is missing or not whole"),
    ],
)
def test_damage_is_told_and_hides_no_other_run(tmp_path, name, content, reason):
    write_run(tmp_path / "whole", (0.5,))
    run_dir = write_run(tmp_path / "damaged", (0.9,))
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_bytes(content)
    told = {os.path.basename(x["run"]): x for x in find_runs(tmp_path)}
    assert told["whole"]["state"] == "unfinished"
    assert told["damaged"]["state"] == "damaged"
    assert reason in told["damaged"]["reason"]
    json.dumps(list(told.values()))


def test_runs_are_found_below_a_folder_the_best_first_within_their_data(tmp_path):
    for name, scores in (("b", (0.7,)), ("a", (0.5,)), ("deep/er/c", (0.9, 0.1))):
        write_run(tmp_path / name, scores)
    write_run(tmp_path / "new")
    write_run(tmp_path / "b/checkpoints/of_a_run")  # a part of the run b
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "history.csv").write_text("x")
    found = [os.path.relpath(x["run"], tmp_path) for x in find_runs(tmp_path)]
    assert found == ["deep/er/c", "b", "a", "new"]
    assert [x["run"] for x in find_runs(tmp_path / "a")] == [str(tmp_path / "a")]
    with pytest.raises(FileNotFoundError, match=r"There is no folder of runs .*/none"):
        find_runs(tmp_path / "none")


def test_only_what_differs_is_compared(tmp_path):
    model = {"model": {"depth": 2}}
    runs = [
        write_run(tmp_path / "a", (0.5,)),
        write_run(tmp_path / "b", (0.6,), learning_rate=0.1, **model),
    ]
    assert differences(runs) == {
        "recipe.learning_rate": [1e-3, 0.1],
        "recipe.model.depth": [None, 2],
    }
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"c must be a run directory: run.json cannot"):
        differences([*runs, tmp_path / "c"])


def test_a_history_keeps_what_only_some_epochs_told(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss,val_loss\n1,2.0,\n2,1.0,3.0\n")
    assert read_history(tmp_path) == [
        {"epoch": 1, "loss": 2.0},
        {"epoch": 2, "loss": 1.0, "val_loss": 3.0},
    ]
    assert read_history(tmp_path / "none") == []
