"""What run directories say of their runs, read without Keras.

`read_run` and `find_runs` never fail on what a directory holds: they tell it.
"""

import contextlib
import csv
import json
import os
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

SCORES = ("val_mean_iou", "val_accuracy", "mean_iou", "accuracy")  # the first decides
STATES = ("state.npz", "state.previous.npz")  # one that is whole is enough to go on


def read_history(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of `history.csv`, one an epoch; none without the file.

    Raises:
        ValueError: If it holds something else.
    """
    path = Path(run_dir) / "history.csv"
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            rows = [
                {key: float(x) for key, x in row.items() if x != ""}
                for row in csv.DictReader(file)
            ]
    except (csv.Error, OSError, TypeError, ValueError) as error:
        raise ValueError(f"history.csv is damaged ({error})") from error
    if not all(row.get("epoch", 0.5).is_integer() for row in rows):
        raise ValueError("history.csv is damaged (a row without its epoch)")
    return rows


def score_name(rows: Sequence[dict[str, float]]) -> str | None:
    """The score that decides which epoch is the best; None if none is told."""
    told = {key for row in rows for key in row}
    return next((key for key in SCORES if key in told), None)


def read_settings(run_dir: str | Path) -> dict:
    """What `run.json` holds.

    Raises:
        ValueError: If there is none, or something else in it.
    """
    try:
        run = json.loads((Path(run_dir) / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"run.json cannot be read ({error})") from error
    parts = [run.get(x) if isinstance(run, dict) else None for x in ("recipe", "data")]
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("name"), str)):
            raise ValueError("run.json is not that of a run of keras-vit")
    return run


def read_run(run_dir: str | Path) -> dict:
    """What a run is and how far it came, as values that JSON can write.

    Returns:
        `run`, its directory; `recipe`, `data`, `epochs_done` of `epochs`, the score
        `best` of the name `score` in the epoch `best_epoch`, `last_loss`, `seconds`,
        the time `last_written`, and `state`: `"finished"`, `"unfinished"`, which goes
        on when the same command is run again, or `"damaged"`, with a `reason`. What is
        not known is None.
    """
    run_dir = Path(run_dir)
    names = "recipe data epochs score best best_epoch last_loss state reason".split()
    told = {"run": str(run_dir), **dict.fromkeys(names)}
    told |= {"epochs_done": 0, "seconds": 0.0, "last_written": _last_written(run_dir)}
    try:
        run = read_settings(run_dir)
        told["recipe"] = run["recipe"]["name"]
        told["epochs"] = run["recipe"].get("epochs")
        told["data"] = run["data"]["name"]
        rows = read_history(run_dir)
        told |= _progress(rows)
        told["state"] = _state(run_dir, rows, told["epochs"])
    except (OSError, ValueError) as error:
        told |= {"state": "damaged", "reason": str(error)}
    return told


def find_runs(directory: str | Path) -> list[dict]:
    """What `read_run` tells of all runs in a folder or below it.

    Returns:
        Those of the same data together, the best score first.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no folder of runs {directory}.")
    found = []
    for folder, folders, files in os.walk(directory):
        if "run.json" in files:
            found.append(read_run(folder))
            folders.clear()  # nothing below a run is another

    def rank(told):
        best = float("-inf") if told["best"] is None else told["best"]
        return told["data"] is None, told["data"] or "", -best, told["run"]

    return sorted(found, key=rank)


def differences(runs: Sequence[str | Path]) -> dict[str, list]:
    """The fields of `run.json` in which runs differ, with the value in each.

    Raises:
        ValueError: If a `run.json` cannot be read.
    """
    fields = []
    for run in runs:
        try:
            fields.append(dict(flat(read_settings(run))))
        except ValueError as error:
            raise ValueError(f"{run} must be a run directory: {error}.") from error
    keys = dict.fromkeys(key for values in fields for key in values)
    told = {key: [values.get(key) for values in fields] for key in keys}
    return {
        key: values for key, values in told.items() if values != values[:1] * len(runs)
    }


def flat(value, key=""):
    """Pairs of a dotted key and a leaf of nested dictionaries; {} is a leaf too.

    Only of `model` is it none: there "not given" tells what is missing.
    """
    if not isinstance(value, dict) or (not value and key != "recipe.model"):
        return [(key, value)]
    return [
        pair
        for name, x in value.items()
        for pair in flat(x, f"{key}.{name}" if key else name)
    ]


def _progress(rows):
    """What the history tells of a run."""
    if not rows:
        return {}
    told = {
        "epochs_done": int(rows[-1]["epoch"]),
        "last_loss": rows[-1].get("loss"),
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
    }
    name = score_name(rows)
    if name is not None:
        best = max(rows, key=lambda row: row.get(name, float("-inf")))
        told |= {"score": name, "best": best[name], "best_epoch": int(best["epoch"])}
    return told


def _state(run_dir, rows, epochs):
    """How a run is.

    Raises:
        ValueError: If it is damaged.
    """
    if rows and not zipfile.is_zipfile(run_dir / "last.keras"):
        raise ValueError("last.keras is missing or not whole")
    if rows and rows[-1]["epoch"] == epochs:
        return "finished"
    if rows and not any(zipfile.is_zipfile(run_dir / name) for name in STATES):
        raise ValueError("state.npz is missing or not whole")
    return "unfinished"


def _last_written(run_dir):
    times = []
    with contextlib.suppress(OSError):  # one that may not be read
        for path in (*run_dir.iterdir(), *run_dir.glob("tensorboard/*")):
            times.append(path.stat().st_mtime)
    if not times:
        return None
    return datetime.fromtimestamp(max(times)).astimezone().isoformat(timespec="seconds")
