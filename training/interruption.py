"""SIGTERM, with which a machine is taken away: a run in the middle of an epoch."""

import os
import signal
import sys
import threading
from collections.abc import Callable

import keras
import tensorflow as tf
from tqdm.auto import tqdm

from training.state import Place

STATUS = 128 + signal.SIGTERM  # 143, what a shell says of a process that it ended


class Sigterm:
    """Whether the process was asked to end, while it is entered.

    The first SIGTERM is only noted, the second ends the process at once. Elsewhere
    than in the main thread, where Python hears no signals, nothing is changed.
    """

    def __init__(self):
        self.received = False
        self.before = None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._note)
            self.before = before or signal.SIG_DFL  # None: not one of Python
        return self

    def __exit__(self, kind, *error):
        if self.before is None:
            return
        signal.signal(signal.SIGTERM, self.before)
        if self.received and kind is None:  # too late to be answered here
            os.kill(os.getpid(), signal.SIGTERM)

    def _note(self, *signal_and_frame):
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def leave(self, where: str) -> None:
        """End the process, whose run is saved.

        Args:
            where: Where in the run, in words.

        Raises:
            SystemExit: With status 143.
        """
        tqdm.write(
            f"SIGTERM: the run was saved {where}; run the same command again to go on.",
            file=sys.stderr,
        )
        raise SystemExit(STATUS)


def fit_from(
    place: Place,
    model: keras.Model,
    batches: Callable[..., tf.data.Dataset],
    held_out: tf.data.Dataset,
    epochs: int,
    steps: int,
    callbacks: list[keras.callbacks.Callback],
    metrics: list,
) -> None:
    """`model.fit` from the middle of an epoch on.

    Keras has as many steps in each epoch of a `fit`, so the rest of an epoch is a `fit`
    of its own. Metrics go on from where they were.

    Args:
        place: How far the run has come.
        model: Compiled.
        batches: `training_batches`, of which the epochs and the first step are still
            to be given.
        held_out: Batches for validation.
        epochs: Number of the last epoch.
        steps: Steps of a whole epoch.
        callbacks: They see whole epochs of one training.
        metrics: Values of the metric variables; empty between two epochs.
    """
    told = _Told(callbacks, model, epochs, steps, place, metrics)
    parts = [(place.epochs, place.step, epochs)]
    if place.step:
        after = place.epochs + 1
        parts = [(place.epochs, place.step, after), (after, 0, epochs)]
    for first, step, last in parts:
        if first < last:
            model.fit(
                batches(first_epoch=first, first_step=step, epochs=last),
                epochs=last,
                initial_epoch=first,
                steps_per_epoch=steps - step,
                validation_data=held_out,
                callbacks=told,
                shuffle=False,
                verbose=0,
            )


class _Told(keras.callbacks.CallbackList):
    """What callbacks are told of `fit_from`: whole epochs, one begin and one end."""

    def __init__(self, callbacks, model, epochs, steps, place, metrics):
        super().__init__(callbacks, True, model=model, epochs=epochs, steps=steps)
        self.place = place
        self.metrics = metrics
        self.epoch = None
        self.first_step = 0

    def on_train_begin(self, logs=None):
        if self.epoch is None:
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        if self.epoch + 1 == self.params["epochs"]:
            super().on_train_end(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.first_step = self.place.step if epoch == self.place.epochs else 0
        if self.first_step:  # Keras has just reset them
            variables = self.model.metrics_variables
            for variable, value in zip(variables, self.metrics, strict=True):
                variable.assign(value)
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        super().on_train_batch_begin(batch + self.first_step, logs)

    def on_train_batch_end(self, batch, logs=None):
        super().on_train_batch_end(batch + self.first_step, logs)
