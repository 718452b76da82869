"""What is watched while a model trains: a bar, and whether the loss is still one."""

import math
from pathlib import Path

import keras
from tqdm.auto import tqdm

from training.history import SCORES
from training.optimizer import learning_rate, steps_done

EXPLODED = 10  # times the loss that a run began with


class LearningRate(keras.callbacks.Callback):
    """Tell the learning rate of the last step of an epoch as Keras tells a metric.

    It comes before the callbacks that show and write what is told.
    """

    def on_epoch_end(self, epoch, logs=None):
        optimizer = self.model.optimizer
        logs["learning_rate"] = learning_rate(optimizer, steps_done(optimizer) - 1)


class Progress(keras.callbacks.Callback):
    """One bar over all epochs: time left, images a second, learning rate and score.

    Images and time are those since the start of this process, not of the run.
    """

    def __init__(self, images_per_step: int = 1):
        super().__init__()
        self.images_per_step = images_per_step
        self.bar = None
        self.told = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.step = steps_done(self.model.optimizer)

    def on_train_batch_begin(self, batch, logs=None):
        steps = self.params["steps"] or 0
        epochs = self.params["epochs"]
        if self.bar is None:
            self.bar = tqdm(
                total=epochs * steps * self.images_per_step or None,
                initial=(self.epoch * steps + batch) * self.images_per_step,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                mininterval=0.5,
                bar_format="{desc}|{bar}|{elapsed}<{remaining}, {rate_fmt}{postfix}",
            )
        text = f"epoch {self.epoch + 1}/{epochs}"
        self.bar.set_description_str(text, refresh=False)

    def on_train_batch_end(self, batch, logs=None):
        if self.bar.update(self.images_per_step):  # it was shown: not every step is
            self._tell(lr=f"{learning_rate(self.model.optimizer, self.step):.2g}")
        self.step += 1

    def on_epoch_end(self, epoch, logs=None):
        score = next((key for key in SCORES if key in logs), None)
        keys = [key for key in ("loss", score) if key in logs]
        told = {key: f"{logs[key]:.3f}" for key in keys}
        if "learning_rate" in logs:
            told = {"lr": f"{logs['learning_rate']:.2g}", **told}
        self._tell(**told)

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Leave the bar as it is; what is said next begins a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def _tell(self, **told):
        self.told |= told
        text = ", ".join(f"{key} {value}" for key, value in self.told.items())
        self.bar.set_postfix_str(text, refresh=False)


class Divergence(keras.callbacks.Callback):
    """Stop a run whose loss is no number any more, or ten times what it began with.

    What began below 1, as fine-tuning does, is stopped at 10.

    The loss of a step is the mean of the epoch so far, as Keras tells it. Weights that
    are no numbers after an epoch stop the run too, before they are written.

    Args:
        run_dir: Where the last good weights are, `last.keras`.
        first_loss: What a run that goes on began with; None for its first step.
    """

    def __init__(self, run_dir: str | Path, first_loss: float | None = None):
        super().__init__()
        self.run_dir = Path(run_dir)
        self.first_loss = first_loss

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Raises RuntimeError if the loss is no number, or too large."""
        loss = float(logs["loss"])
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = abs(loss)
        place = f"at step {batch + 1} of epoch {self.epoch + 1}"
        if not math.isfinite(loss):
            self._stop(f"The loss is {loss} {place}")
        if loss > EXPLODED * max(1.0, self.first_loss):
            self._stop(
                f"The loss has grown from {self.first_loss:.4g} to {loss:.4g} {place}"
            )

    def on_epoch_end(self, epoch, logs=None):
        """Raises RuntimeError if a weight is no number."""
        for variable in self.model.trainable_variables:
            if not keras.ops.all(keras.ops.isfinite(variable)):
                self._stop(f"{variable.path} is not finite after epoch {epoch + 1}")

    def _stop(self, what):
        advice = (
            "Try a lower learning_rate, a longer warm-up, clip_norm=1.0 or "
            "precision=float32, in another run directory."
        )
        last = self.run_dir / "last.keras"
        if last.exists():
            advice += (
                f" The weights after the last good epoch are in {last}: --from {last} "
                "starts from them."
            )
        raise RuntimeError(f"{what}; the run was stopped. {advice}")
