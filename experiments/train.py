"""How the experiments train a model and ask it."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import scipy.special
import tensorflow as tf

import training

CURVES = 100  # held-out images that the training curves are drawn of; nothing else
ASKED = 360  # images of a batch that is asked
EPOCHS = 4  # what is done after each takes a second
# To look for loops of tensors takes a quarter of a short run, and there are none.
_fit = tf.autograph.experimental.do_not_convert(training.fit)


def recipe(name: str, **fields) -> training.Recipe:
    """A recipe with what all experiments have in common; the rest are `fields`."""
    common = {
        "source": f"experiments/{name}.py",
        "cost": "see experiments/README.md",
        "expected": "see experiments/README.md",
        "data": name,
        "model": {},
        "batch_size": 64,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "precision": "auto",
    }
    return training.Recipe(name=name, **common | fields)


def dataset(
    name: str,
    images: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    labels: tuple[str, ...],
) -> training.Dataset:
    """A dataset of arrays; of what is held out it shows the curves a little."""
    held_out = tuple(x[:CURVES] for x in held_out)
    return training.from_arrays(images, held_out, labels, name=name)


def shown(count: int, seen: int) -> tuple[np.ndarray, int]:
    """What an epoch shows: few images often, so that epochs are few and long.

    Args:
        count: Number of different images.
        seen: How many the model is to see in all.

    Returns:
        Numbers of the images of an epoch, all of them as often or once more, and the
        number of epochs.
    """
    epochs = max(1, min(EPOCHS, seen // count))
    return np.arange(max(seen // epochs, count)) % count, epochs


def train(
    build: Callable[[], keras.Model],
    data: training.Dataset,
    how: training.Recipe,
    folder: Path,
) -> keras.Model:
    """Train a model; killed, the same call goes on."""
    keras.utils.clear_session()
    return _fit(build, data, how, folder / "run")


def shared(path: Path, make: Callable[[], keras.Model]) -> keras.Model:
    """A model that several runs need: the first of them makes it, and its file stays.

    Args:
        path: A file for it, of the backend that trains.
        make: Trains it.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{os.getpid()}-{path.name}")
        make().save(new)
        with contextlib.suppress(FileExistsError):  # another run was first
            os.link(new, path)
        new.unlink()
    return keras.saving.load_model(path, compile=False)


def logits(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """What a model says of raw images, grey ones made of three equal colours."""
    found = []
    for start in range(0, len(images), ASKED):
        batch = images[start : start + ASKED]
        if batch.ndim == 3:
            batch = np.repeat(batch[..., None], 3, axis=-1)
        found.append(keras.ops.convert_to_numpy(model.predict_on_batch(batch)))
    return np.concatenate(found)


def scores(answers: np.ndarray, classes: np.ndarray) -> dict[str, float]:
    """Accuracy and cross-entropy of logits `(N, C)`."""
    log = scipy.special.log_softmax(answers.astype("float64"), axis=-1)
    return {
        "accuracy": round(float((answers.argmax(-1) == classes).mean()), 6),
        "cross_entropy": round(float(-log[np.arange(len(classes)), classes].mean()), 6),
    }
