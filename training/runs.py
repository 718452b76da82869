"""What a run directory says of its run: `run.json`, and the end of its history."""

import contextlib
import csv
import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path

import keras

from keras_vit.embedding import Preprocess
from keras_vit.model_file import replacing
from training.data import Dataset
from training.distribution import PLAIN, Placement
from training.evaluation import in_words
from training.files import checkpoint_identity
from training.history import flat
from training.recipe import Recipe

PACKAGES = ("keras", "tensorflow", "jax", "torch", "numpy", "keras-vit")

# what a run may go on with another value of
FREE = ("recipe.damaged_images", "recipe.remat")


def describe_run(
    run_dir: Path,
    recipe: Recipe,
    data: Dataset,
    preprocess: Preprocess,
    policy: str,
    placement: Placement = PLAIN,
) -> None:
    """Write `run.json`, or check that the one there tells of the same run.

    The devices are told, but a run may go on with others.

    Raises:
        ValueError: If it tells of another run, or is damaged.
    """
    same = {
        "recipe": dataclasses.asdict(recipe),
        "precision": policy,
        "backend": keras.backend.backend(),
        "data": {
            "name": data.name,
            "sizes": data.sizes,
            "fingerprint": data.fingerprint,
        },
        "labels": list(data.labels),
        "preprocess": dataclasses.asdict(preprocess),
    }
    if recipe.checkpoint is not None:
        same["checkpoint"] = checkpoint_identity(recipe.checkpoint)
    if recipe.teaching is not None:
        same["teacher"] = checkpoint_identity(recipe.teaching.teacher)
    path = run_dir / "run.json"
    if path.exists():
        _check_same(path, same)
        return
    if not placement.is_chief:
        return
    run = {
        **same,
        "devices": dataclasses.asdict(placement.devices),
        "processes": placement.processes,
        "versions": _versions(),
        "platform": platform.platform(),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(run, indent=2) + "\n")


def _versions():
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _check_same(path, same):
    try:
        before = dict(flat(json.loads(path.read_text())))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Choose another run directory."
        ) from error
    now = dict(flat(json.loads(json.dumps(same))))
    given = ("recipe.", "checkpoint.", "teacher.")
    chosen = [key for key in before if key.startswith(given)]
    for key in dict.fromkeys([*now, *chosen]):
        if key in FREE:
            continue
        missing = "not given" if key.startswith("recipe.model.") else None
        old, new = before.get(key, missing), now.get(key, missing)
        if old != new:
            raise ValueError(
                f"{path.parent} holds another run: its {key} is {old!r}, now it is "
                f"{new!r}. Choose another run directory, or delete that one."
            )


def summary(run_dir: Path) -> str:
    """The last line of a run's history, in words."""
    with (run_dir / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    held_out = {
        name.removeprefix("val_"): float(last[name])
        for name in ("val_accuracy", "val_mean_iou")
        if name in last
    }
    return f"{last['epoch']} epochs done, held-out {in_words(held_out)}"
