"""Damaged images: skipped, named and counted.

What the batches skip (`training.mending`) is told here by its number. It gets its name
at the end of the epoch, in one sentence and in `damaged.txt` of the run; too many of
them stop the run.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.model_file import replacing
from training.data import Dataset, label_map_damage, shortened
from training.order import places
from training.recipe import Recipe
from training.sharding import union

NOTHING_LEFT = "every held-out image is damaged"


class HeldOutDamage:
    """The damaged images among the held-out ones, which count in no score.

    Args:
        data: Whose images they are.
        limit: How many may be damaged; None for all but one.
        speaks: Whether this process, of several, tells of them.
    """

    def __init__(self, data: Dataset, limit: int | None = None, speaks: bool = True):
        self.data, self.limit, self.speaks = data, limit, speaks
        self.found, self.named = set(), set()

    def tell(self, numbers: np.ndarray) -> None:
        """Take the numbers of images that do not decode.

        Raises:
            ValueError: If no held-out image is left.
        """
        self.found.update(numbers.tolist())
        if len(self.found) == self.data.sizes["validation"]:
            raise ValueError(NOTHING_LEFT)

    def settle(self) -> list[str]:
        """Name the new ones in a sentence; return their names.

        Raises:
            ValueError: If more than the limit are damaged.
        """
        new = sorted(set(self.found) - self.named)
        names = self.data.names_of("validation", new)
        self.named.update(new)
        if self.limit is not None and len(self.named) > self.limit:
            names = self.data.names_of("validation", sorted(self.named))
            raise ValueError(_too_many("held-out", names, self.limit))
        if names and self.speaks:
            _say("held-out", "left out of the score", names, self.limit)
        return names


class Damage(keras.callbacks.Callback):
    """Name the damaged images of a training, and stop it where they are too many.

    Give `train` and `held_out.tell` to the batches as `damaged`.

    Args:
        data: What is trained on.
        recipe: How: it says the order of the images, and how many may be damaged.
        images: Images an epoch.
        run_dir: Where `damaged.txt` goes.
        part: (p, P): which process of how many this is; the first one speaks.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        images: int,
        run_dir: str | Path,
        part: tuple[int, int] = (0, 1),
    ):
        super().__init__()
        self.data, self.recipe, self.images, self.part = data, recipe, images, part
        self.path = Path(run_dir) / "damaged.txt"
        self.found, self.named = set(), set()
        limit = recipe.damaged_images
        self.held_out = HeldOutDamage(data, limit, speaks=part[0] == 0)

    def train(self, numbers: np.ndarray) -> None:
        """Take the places in the order of images that do not decode."""
        self.found.update(numbers.tolist())

    def on_epoch_begin(self, epoch, logs=None):
        self.end = (epoch + 1) * self.images  # the batches are ahead of the training

    def on_train_batch_end(self, batch, logs=None):
        """Do not wait for the end of an epoch that has too many."""
        if len(self.found) > self.recipe.damaged_images and self.part[1] == 1:
            self._settle(set(self.found))

    def on_epoch_end(self, epoch, logs=None):
        """Raises ValueError if more are damaged than the recipe allows."""
        self._settle({place for place in set(self.found) if place < self.end})
        self._write(self.held_out.settle())

    def _settle(self, settled):
        """Name the images of places that were told."""
        self.found -= settled
        recipe = self.recipe
        order = (self.images, recipe.seed, recipe.augmentation.repeats)
        found = set(places(self.data, settled, *order).values())
        new = union(found - self.named, self.part, recipe.damaged_images + 1)
        new -= self.named
        self.named |= new
        names = self.data.names_of("train", sorted(new))
        self._write(names)
        if len(self.named) > recipe.damaged_images:
            names = self.data.names_of("train", sorted(self.named))
            raise ValueError(_too_many("training", names, recipe.damaged_images))
        if names and self.part[0] == 0:
            effect = "replaced, each by another of its batch"
            _say("training", effect, names, recipe.damaged_images)

    def _write(self, names):
        if not names or self.part[0]:
            return
        before = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as path:
            path.write_text("\n".join(dict.fromkeys(before + names)) + "\n")


@contextlib.contextmanager
def naming_what_stops(data: Dataset) -> Iterator[None]:
    """Turn the errors of batches that skip damaged images into sentences.

    Raises:
        ValueError: If no whole image is left, with the files; or with the damaged
            shards of the label maps.
    """
    try:
        with warnings.catch_warnings():
            # Of held-out images: how many are whole is known when they were read.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            yield
    except tf.errors.OpError as error:
        if sentence := label_map_damage(error):
            raise ValueError(sentence) from error
        if NOTHING_LEFT not in str(error) and "expected to contain" not in str(error):
            raise
        with data.naming_damaged_files():
            raise


def _say(kind, effect, names, limit):
    advice = "Repair or remove what is damaged"
    if limit is not None:
        advice += f"; more than damaged_images={limit} stop the run"
    tqdm.write(
        f"{_are_damaged(kind, names)} and {effect}: {shortened(names)}. {advice}."
    )


def _too_many(kind, names, limit):
    return (
        f"{_are_damaged(kind, names)}, more than damaged_images={limit}: "
        f"{shortened(names)}. Repair or remove them, or raise damaged_images."
    )


def _are_damaged(kind, names):
    one = len(names) == 1
    return f"{len(names)} {kind} {'image is' if one else 'images are'} damaged"
