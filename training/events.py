"""The curves of a run as TensorBoard reads them: `tensorboard --logdir runs`."""

import contextlib
import os
import re
import time
from pathlib import Path

import keras
import tensorflow as tf

from training.optimizer import learning_rate, steps_done

FOLDER = "tensorboard"  # in the run directory
FILES = "events.out.tfevents.*"
EVERY = 20  # updates between two points of a curve over updates


class TensorBoard(keras.callbacks.Callback):
    """Write scalars into `tensorboard` of a run directory.

        epoch/NAME              all that Keras tells after an epoch, over epochs
        epoch/images_per_second in training, without the validation
        step/loss               mean since the point before, over updates
        step/learning_rate      of the update

    What a run lost when it was killed is taken out of the files when it goes on, so
    that no point is there twice: readers do not agree which of two they show.

    Args:
        run_dir: Where the run is kept.
        images_per_step: Batch size.
    """

    def __init__(self, run_dir: str | Path, images_per_step: int = 1):
        super().__init__()
        self.directory = Path(run_dir) / FOLDER
        self.images_per_step = images_per_step
        self.writer = None

    def on_epoch_begin(self, epoch, logs=None):
        """Raises OSError if a file cannot be written, as all that follow."""
        optimizer = self.model.optimizer
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        self.parts = inner.gradient_accumulation_steps or 1
        self.step = steps_done(optimizer)
        if self.writer is None:
            limits = {"epoch": epoch, "step": self.step // self.parts}
            with _writing(self.directory):
                _forget(self.directory, limits)
                self.writer = tf.summary.create_file_writer(str(self.directory))
        self.counted = None  # steps of the epoch up to the last point
        self.images = 0
        self.started = self.ended = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        self.ended = time.monotonic()
        self.images += self.images_per_step
        self.step += 1
        count, total = batch + 1, (batch + 1) * logs["loss"]  # the epoch's mean so far
        if self.counted is None:  # what was lost within the epoch is not known
            self.counted, self.total = (batch, 0.0) if batch == 0 else (count, total)
        if self.step % (self.parts * EVERY) or count == self.counted:
            return
        values = {
            "loss": (total - self.total) / (count - self.counted),
            "learning_rate": learning_rate(self.model.optimizer, self.step - 1),
        }
        self.counted, self.total = count, total
        self._write("step", values, self.step // self.parts)

    def on_epoch_end(self, epoch, logs=None):
        rate = self.images / max(self.ended - self.started, 1e-9)
        self._write("epoch", {**logs, "images_per_second": rate}, epoch + 1)

    def on_train_end(self, logs=None):
        if self.writer is not None:
            self.writer.close()

    def _write(self, group, values, step):
        kind = tf.compat.v1.SummaryMetadata()
        kind.plugin_data.plugin_name = "scalars"  # tf.summary.scalar needs tensorboard
        kind.data_class = 1  # a scalar
        with _writing(self.directory), self.writer.as_default(step):
            for name, value in values.items():
                value = tf.constant(value, tf.float32)
                tf.summary.write(f"{group}/{name}", value, metadata=kind)
            self.writer.flush()  # the process may end at any step


@contextlib.contextmanager
def _writing(directory):
    """Raises OSError, one that says what to do, if a file cannot be written."""
    try:
        yield
    except tf.errors.OpError as error:
        reason = error.message.splitlines()[0].rpartition("; ")[2]
        raise OSError(
            f"{directory} could not be written ({reason}); make room and run the same "
            "command again to go on."
        ) from error


def _files(directory):
    """In the order in which they were begun: a second, and the count of a process."""

    def parts(file):
        words = re.split(r"(\d+)", file.name)
        return [int(x) if x.isdecimal() else x for x in words]

    return sorted(directory.glob(FILES), key=parts)


def read_events(directory: Path) -> list:
    """Events in the files of a directory, in their order, up to where one is torn."""
    events = []
    for file in _files(directory):
        records = tf.data.TFRecordDataset(str(file)).as_numpy_iterator()
        try:
            for record in records:
                events.append(tf.compat.v1.Event.FromString(record))
        except tf.errors.DataLossError:  # killed while it was written
            continue
    return events


def _forget(directory, limits):
    """Leave one file, of points that are not beyond the limit of their group."""
    files = _files(directory)
    if not files:
        return
    kept = directory.with_name(f".{FOLDER}")
    seen = set()
    with tf.io.TFRecordWriter(str(kept)) as writer:
        for event in read_events(directory):
            tags = [value.tag for value in event.summary.value]
            key = (event.WhichOneof("what"), *tags, event.step)
            limit = limits.get("".join(tags).partition("/")[0], event.step)
            if key not in seen and event.step <= limit:
                writer.write(event.SerializeToString())
            seen.add(key)
    os.replace(kept, files[0])
    for file in files[1:]:
        file.unlink()
