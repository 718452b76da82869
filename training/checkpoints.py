"""What a run keeps after each epoch, and how it goes on from there.

    history.csv         one row an epoch
    last.keras          the model after the last epoch
    best.keras          the model of the best validation accuracy, or mean IoU of pixels
    state.npz           every variable of model, optimizer and seed generators, for
                        resuming; after a SIGTERM also of the metrics, within an epoch
    state.previous.npz  the one before, for when that one is damaged

Where the optimizer keeps an average of the weights, the two models are that average;
the states have both.
"""

import contextlib
import csv
import io
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.model_file import remove_leftovers, replacing
from training.distribution import is_chief, portable, to_numpy
from training.history import SCORES
from training.interruption import Sigterm
from training.optimizer import weights_average
from training.state import (
    PREVIOUS,
    STATE,
    Place,
    find_state,
    keep_whole,
    read_place,
    read_state,
    write_state,
)
from training.task import network_of, run_variables

LAST, BEST, HISTORY = "last.keras", "best.keras", "history.csv"


class Checkpoint(keras.callbacks.Callback):
    """Write the run after each epoch, every file by one atomic replacement.

    A run goes on from the state alone, which is written last, so a kill between two
    files harms nothing.

    Args:
        run_dir: Where the files go.
        sigterm: Whether to write in the middle of an epoch and end the process.
    """

    def __init__(self, run_dir: str | Path, sigterm: Sigterm | None = None):
        super().__init__()
        self.run_dir = Path(run_dir)
        self.sigterm = sigterm or Sigterm()
        self.kept = Place()  # what the state on the disk has
        self.history = []

    def on_train_begin(self, logs=None):
        self.run_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.run_dir)
        self.kept = keep_whole(self.run_dir)
        self.history = list(self.kept.history)

    def on_epoch_begin(self, epoch, logs=None):
        self.history = self.history[:epoch]
        before = self.kept.seconds if epoch == self.kept.epochs else 0.0
        self.started = time.monotonic() - before

    def on_train_batch_end(self, batch, logs=None):
        """Raises SystemExit if the process was asked to end.

        After the last step that waits until the epoch is written.
        """
        step, steps = batch + 1, self.params["steps"]
        if not self.sigterm.received or step == steps:
            return
        if hasattr(self.model, "jax_state_sync"):  # else variables are the epoch's old
            self.model.jax_state_sync()
        self._write_state(step)
        where = f"in the middle of epoch {len(self.history) + 1}"
        self.sigterm.leave(f"{where} after step {step} of {steps}")

    def on_epoch_end(self, epoch, logs=None):
        """Raises SystemExit if the process was asked to end."""
        row = {"epoch": epoch + 1, **{key: float(x) for key, x in logs.items()}}
        row["seconds"] = self._seconds()
        self.history.append(row)
        scores = [
            next((x[key] for key in SCORES if key in x), 0.0) for x in self.history
        ]
        self._save_model(LAST)
        if scores[-1] >= max(scores):
            self._save_model(BEST)
        self._write_history(list(row))
        self._write_state()
        if self.sigterm.received:
            self.sigterm.leave(f"after epoch {epoch + 1} of {self.params['epochs']}")

    def _seconds(self):
        return round(time.monotonic() - self.started, 3)

    def _save_model(self, name):
        model = network_of(self.model)  # without its optimizer: the state has that
        plain = keras.Model(model.input, model.output, name=model.name)
        size = 4 * model.count_params()  # float32 under every policy
        with self._room(name, size), averaged(self.model):
            with replacing(self.run_dir / name) as path:
                portable(plain).save(path)

    def _write_history(self, names):
        text = io.StringIO()
        rows = csv.DictWriter(text, names, restval="")
        rows.writeheader()
        rows.writerows(self.history)
        with self._room(HISTORY, len(text.getvalue())):
            with replacing(self.run_dir / HISTORY) as path:
                path.write_text(text.getvalue())

    def _write_state(self, step=0):
        """All variables, and within an epoch those of its metrics."""
        place = Place(tuple(self.history), step, self._seconds() if step else 0.0)
        variables = _variables(self.model)
        arrays = {key: to_numpy(variable.value) for key, variable in variables.items()}
        if step:
            metrics = _numbered("metrics", self.model.metrics_variables)
            for key, variable in metrics.items():
                whole = keras.ops.copy(variable.value)  # TensorFlow sums its devices
                arrays[key] = keras.ops.convert_to_numpy(whole)
        with self._room(STATE, sum(x.nbytes for x in arrays.values())):
            write_state(self.run_dir, place, arrays)
        self.kept = place

    @contextlib.contextmanager
    def _room(self, name, size):
        """Raises OSError, one that says what to do, if a file cannot be written."""
        try:
            yield
        except OSError as error:
            path = self.run_dir / name
            size = max(size, path.stat().st_size if path.exists() else 0)
            free = shutil.disk_usage(self.run_dir).free
            kept = f"The checkpoint of {self.kept} is intact"
            if self.kept == Place():
                kept = "There is no checkpoint yet"
            raise OSError(
                f"{path} could not be written ({error.strerror or error}): it takes "
                f"{size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. {kept}; "
                "make room and run the same command again to go on."
            ) from error


class Average(keras.callbacks.Callback):
    """Validate the average of the weights, where the optimizer keeps one."""

    def on_test_begin(self, logs=None):
        _exchange(self.model)

    def on_test_end(self, logs=None):
        _exchange(self.model)


@contextlib.contextmanager
def averaged(model: keras.Model) -> Iterator[None]:
    """While it lasts the weights are their average, where the optimizer keeps one."""
    _exchange(model)
    try:
        yield
    finally:
        _exchange(model)


def use_average(model: keras.Model) -> None:
    """Leave the average in the weights, where the optimizer keeps one."""
    averages = weights_average(model.optimizer) or ()
    for variable, average in zip(model.trainable_variables, averages, strict=False):
        variable.assign(keras.ops.copy(average.value))  # JAX donates a buffer once


def _exchange(model):
    """Weights and their average change places."""
    averages = weights_average(model.optimizer) or ()
    for variable, average in zip(model.trainable_variables, averages, strict=False):
        value = keras.ops.copy(variable.value)
        variable.assign(average.value)
        average.assign(value)


def first_loss(run_dir: Path) -> float | None:
    """Training loss of the first epoch of a run; None if there is none."""
    history = read_place(find_state(run_dir)[0]).history
    return history[0].get("loss") if history else None


def resume(model: keras.Model, run_dir: str | Path) -> int:
    """Give a compiled model the state that `run_dir` holds, if it holds one.

    Where that is damaged or missing, it says so and takes the state before it.

    Returns:
        Number of epochs that are done: the `initial_epoch` for `model.fit`.

    Raises:
        ValueError: If both are damaged, belong to another model, or were written within
            an epoch.
    """
    place, _ = restore(model, run_dir)
    if place.step:
        raise ValueError(
            f"{run_dir} holds a run that SIGTERM has ended at {place}; training.fit "
            "goes on from there, model.fit cannot."
        )
    return place.epochs


def restore(
    model: keras.Model, run_dir: str | Path, held_out: tf.data.Dataset | None = None
) -> tuple[Place, list]:
    """As `resume`, also in the middle of an epoch.

    Args:
        model: Compiled.
        run_dir: Where the run is.
        held_out: Batches from which the metrics of a run within an epoch are made.

    Returns:
        How far the run has come, and the values of its metric variables, which
        `model.fit` resets: they are for `training.interruption.fit_from`.

    Raises:
        ValueError: If both are damaged or belong to another model.
    """
    run_dir = Path(run_dir)
    path, wrong = find_state(run_dir)
    if path is None:
        return Place(), []
    place, arrays = read_state(path)
    if path.name == PREVIOUS and is_chief():
        tqdm.write(
            f"{run_dir / STATE}: {wrong}; the run goes on from {PREVIOUS}, {place}.",
            file=sys.stderr,
        )
    if place.step and held_out is not None:
        model.evaluate(held_out, steps=1, verbose=0)  # Keras makes them when needed
    if not model.optimizer.built:  # that of a loss scale would be built once more
        model.optimizer.build(model.trainable_variables)
    metrics = [arrays.pop(key) for key in list(arrays) if key.startswith("metrics/")]
    variables = _variables(model)
    fits = set(variables) == set(arrays) and all(
        tuple(v.shape) == arrays[key].shape for key, v in variables.items()
    )
    if not fits:
        raise ValueError(
            f"{path} must hold the variables of this model and "
            f"optimizer, got others. Choose another run directory."
        )
    for key, variable in variables.items():
        variable.assign(arrays[key])
    return place, metrics


def _variables(model):
    """Every variable, the states of seed generators among them, by a stable key."""
    return {
        **_numbered("model", run_variables(model)),
        **_numbered("optimizer", model.optimizer.variables),
    }


def _numbered(group, variables):
    return {f"{group}/{i:05d}": variable for i, variable in enumerate(variables)}
