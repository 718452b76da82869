"""Training runs that survive: precision, compile, callbacks, resume.

A run directory holds
    run.json      recipe, data, labels, versions, device: all that a repetition needs
    history.csv   one row an epoch
    last.keras    the model after the last epoch
    best.keras    the model of the best validation accuracy, or mean IoU of pixels
    state.npz     every variable of model, optimizer and seed generators, for resuming
"""

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import platform
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
from tqdm.auto import tqdm

from keras_vit import kernels
from training.batches import (
    check_labels,
    steps_per_epoch,
    training_batches,
    validation_batches,
)
from training.data import Dataset, subset
from training.files import replacing
from training.optimize import optimizer
from training.recipe import Recipe
from training.task import (
    check_fits,
    network_of,
    objective,
    preprocess_for,
    token_grid,
    trainer,
)
from training.token_labeling import TokenLabeling

SCORES = ("val_mean_iou", "val_accuracy", "mean_iou", "accuracy")  # the first decides


def fit(
    build_model: Callable[[], keras.Model],
    data: Dataset,
    recipe: Recipe,
    run_dir: str | Path,
) -> keras.Model:
    """Train a model by a recipe; killed at any moment, the same call goes on.

    The dtype policy that the recipe asks for is set before `build_model` is called
    and restored on return.

    Args:
        build_model: Returns the model, with one logit for each label of `data`, in
            each pixel where `data` has masks.
        data: What `load_data` returns.
        recipe: How to train.
        run_dir: Where the run is kept; a run that it holds already is continued.

    Returns:
        The model after the last epoch.

    Raises:
        ValueError: If `run_dir` holds a run of another recipe, data or backend, its
            state is damaged, or the model and the data do not fit.
    """
    run_dir = Path(run_dir)
    if recipe.train_images is not None:
        data = subset(data, recipe.train_images, recipe.seed)
    steps = steps_per_epoch(data, recipe.batch_size)
    with precision(recipe) as policy:
        keras.utils.set_random_seed(recipe.seed)
        network = build_model()
        check_fits(network, data)
        preprocess = preprocess_for(network, data)
        model = trainer(network, recipe)
        labels = {
            "augmentation": recipe.augmentation,
            "token_grid": token_grid(network, preprocess, recipe),
            "class_labels": _class_labels(recipe),
        }
        check_labels(data, **labels)
        _describe_run(run_dir, recipe, data, preprocess, policy)
        compile_model(model, recipe, steps)
        first_epoch = resume(model, run_dir)
        batches = training_batches(
            data,
            preprocess,
            recipe.batch_size,
            epochs=recipe.epochs,
            first_epoch=first_epoch,
            seed=recipe.seed,
            **labels,
        )
        held_out = validation_batches(data, preprocess, recipe.batch_size)
        if first_epoch < recipe.epochs:
            with data.naming_damaged_files():
                model.fit(
                    batches,
                    epochs=recipe.epochs,
                    initial_epoch=first_epoch,
                    steps_per_epoch=steps,
                    validation_data=held_out,
                    callbacks=callbacks(run_dir, images_per_step=recipe.batch_size),
                    shuffle=False,
                    verbose=0,
                )
    return network


def _class_labels(recipe):
    how = recipe.token_labeling
    return "truth" if how is None else how.class_labels


def compile_model(model: keras.Model, recipe: Recipe, steps_per_epoch: int) -> None:
    """Compile a model of logits by a recipe, for those who call `model.fit`.

    Loss and metrics are those of `training.task.objective`; a `TokenLabeling` has its
    own.
    """
    if isinstance(model, TokenLabeling):
        model.compile(optimizer(model, recipe, steps_per_epoch))
        return
    loss, metrics = objective(model)
    model.compile(optimizer(model, recipe, steps_per_epoch), loss, metrics=metrics)


def callbacks(
    run_dir: str | Path, images_per_step: int = 1
) -> list[keras.callbacks.Callback]:
    """A progress bar and checkpoints, for those who call `model.fit`.

    Args:
        run_dir: Where `state.npz`, `last.keras`, `best.keras` and `history.csv` go.
        images_per_step: Batch size, for the rate that the bar shows.
    """
    return [Checkpoint(run_dir), Progress(images_per_step)]


@contextlib.contextmanager
def precision(recipe: Recipe) -> Iterator[str]:
    """Set the global dtype policy of the recipe; restore the old one on exit."""
    policy = recipe.precision
    if policy == "auto":
        policy = kernels.half_precision() or "float32"
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield policy
    finally:
        keras.config.set_dtype_policy(before)


class Progress(keras.callbacks.Callback):
    """One bar over all epochs, with images a second and the time that is left."""

    def __init__(self, images_per_step: int = 1):
        super().__init__()
        self.images_per_step = images_per_step
        self.bar = None
        self.text = {}

    def on_epoch_begin(self, epoch, logs=None):
        steps = self.params["steps"] or 0
        epochs = self.params["epochs"]
        if self.bar is None:
            self.bar = tqdm(
                total=epochs * steps * self.images_per_step or None,
                initial=epoch * steps * self.images_per_step,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.5,
            )
        self.bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)

    def on_train_batch_end(self, batch, logs=None):
        self.bar.update(self.images_per_step)

    def on_epoch_end(self, epoch, logs=None):
        score = next((key for key in SCORES if key in logs), None)
        keys = [key for key in ("loss", "val_loss", score) if key in logs]
        self.bar.set_postfix({key: f"{logs[key]:.3f}" for key in keys}, refresh=False)

    def on_train_end(self, logs=None):
        if self.bar is not None:
            self.bar.close()


class Checkpoint(keras.callbacks.Callback):
    """Write the run after each epoch, every file by one atomic replacement.

    `resume` reads `state.npz` alone, and `history.csv` is written from it, so a kill
    between two files harms nothing.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.run_dir = Path(run_dir)
        self.history = []

    def on_train_begin(self, logs=None):
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.history = list(_read_state(self.run_dir)[0])

    def on_epoch_begin(self, epoch, logs=None):
        self.history = self.history[:epoch]
        self.started = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, **{key: float(x) for key, x in logs.items()}}
        row["seconds"] = round(time.monotonic() - self.started, 3)
        self.history.append(row)
        scores = [
            next((x[key] for key in SCORES if key in x), 0.0) for x in self.history
        ]
        self._save_model("last.keras")
        if scores[-1] >= max(scores):
            self._save_model("best.keras")
        with replacing(self.run_dir / "state.npz") as path:
            np.savez(path, history=json.dumps(self.history), **_state(self.model))
        with replacing(self.run_dir / "history.csv") as path:
            text = io.StringIO()
            rows = csv.DictWriter(text, list(row), restval="")
            rows.writeheader()
            rows.writerows(self.history)
            path.write_text(text.getvalue())

    def _save_model(self, name):
        model = network_of(self.model)  # without its optimizer: state.npz has that
        plain = keras.Model(model.input, model.output, name=model.name)
        with replacing(self.run_dir / name) as path:
            plain.save(path)


def resume(model: keras.Model, run_dir: str | Path) -> int:
    """Give a compiled model the state that `run_dir` holds, if it holds one.

    Returns:
        Number of epochs that are done: the `initial_epoch` for `model.fit`.

    Raises:
        ValueError: If the file is damaged or belongs to another model.
    """
    history, arrays = _read_state(Path(run_dir))
    if not history:
        return 0
    model.optimizer.build(model.trainable_variables)
    variables = _variables(model)
    fits = set(variables) == set(arrays) and all(
        tuple(v.shape) == arrays[key].shape for key, v in variables.items()
    )
    if not fits:
        raise ValueError(
            f"{Path(run_dir) / 'state.npz'} must hold the variables of this model and "
            f"optimizer, got others. Choose another run directory."
        )
    for key, variable in variables.items():
        variable.assign(arrays[key])
    return len(history)


def _variables(model):
    """Every variable, the states of seed generators among them, by a stable key."""
    groups = {"model": model.variables, "optimizer": model.optimizer.variables}
    return {
        f"{group}/{i:05d}": variable
        for group, variables in groups.items()
        for i, variable in enumerate(variables)
    }


def _state(model):
    return {
        key: keras.ops.convert_to_numpy(variable.value)
        for key, variable in _variables(model).items()
    }


def _read_state(run_dir):
    """The history and the arrays of `state.npz`; two empty ones without a file."""
    path = run_dir / "state.npz"
    if not path.exists():
        return [], {}
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        return json.loads(str(arrays.pop("history"))), arrays
    except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged ({error}). Delete it to start the run again."
        ) from error


def _describe_run(run_dir, recipe, data, preprocess, policy):
    """Write `run.json`, or check that the one there tells of the same run."""
    packages = ("keras", "tensorflow", "jax", "torch", "numpy", "keras-vit")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
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
    run = {**same, "versions": versions, "platform": platform.platform()}
    path = run_dir / "run.json"
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}). Choose another run directory."
            ) from error
        for key, value in _flat(json.loads(json.dumps(same))):
            old = dict(_flat(before)).get(key)
            if old != value:
                raise ValueError(
                    f"{run_dir} holds another run: its {key} is {old!r}, now it is "
                    f"{value!r}. Choose another run directory, or delete that one."
                )
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(run, indent=2) + "\n")


def _flat(value, key=""):
    """Pairs of a dotted key and a leaf of nested dictionaries."""
    if not isinstance(value, dict):
        return [(key, value)]
    return [
        pair
        for name, x in value.items()
        for pair in _flat(x, f"{key}.{name}" if key else name)
    ]
