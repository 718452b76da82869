"""A picture of the learning rate of a recipe."""

from pathlib import Path

import keras
import numpy as np

from training.curves import new_axes, save
from training.optimize import schedule
from training.recipe import Recipe

POINTS = 2000


def draw_learning_rate(recipe: Recipe, images: int, path: str | Path) -> None:
    """Write a picture: the learning rate of each update over the epochs.

    Args:
        recipe: Whose rate.
        images: Number of training images.
        path: PNG file.

    Raises:
        ValueError: If there is not one batch of images, or the warm-up is too long.
    """
    updates = images // recipe.batch_size
    if not updates:
        raise ValueError(
            f"batch_size must be at most the {images} training images, got "
            f"{recipe.batch_size}."
        )
    total = recipe.epochs * updates
    steps = np.unique(np.linspace(0, total, POINTS).astype(int))
    rates = schedule(recipe, updates)(steps)
    figure, (axes,) = new_axes()
    axes.plot(steps / updates, keras.ops.convert_to_numpy(rates), color="#0072b2")
    axes.set_title(
        f"{recipe.name}: {recipe.optimizer}, {recipe.epochs} epochs of {updates:,} "
        "updates",
        fontsize=10,
    )
    axes.set(xlabel="epoch", ylabel="learning rate", xlim=(0, recipe.epochs))
    axes.set_ylim(bottom=0)
    save(figure, path)
