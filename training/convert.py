"""Checkpoints for the command line: look, convert, train on; all in sentences."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

import keras_vit
from keras_vit import checkpoint
from keras_vit.checkpoint_files import SUFFIXES
from keras_vit.checkpoint_write import LAYOUTS
from keras_vit.encoder import unknown
from keras_vit.model_file import replacing
from training.files import checkpoint_source
from training.recipe import Recipe


def convert(
    source: str, out: str | Path, layout: str | None = None, **overrides
) -> tuple[keras_vit.CheckpointReport, list[str]]:
    """Load a checkpoint and write it as a `.keras` file, or back in a layout.

    Args:
        source: What `keras_vit.from_checkpoint` takes, or a run directory.
        out: A file `NAME.keras`, there as a whole or not at all; for a layout a file
            `NAME.safetensors` or a folder. Folders above it are made.
        layout: `"timm"` or `"hf"`, for `keras_vit.to_checkpoint`; None for `.keras`.
        **overrides: Arguments of the model that shall be others.

    Returns:
        What was read, and sentences of what a user must know of it.

    Raises:
        ValueError: If the layout is unknown or `out` does not fit it, the checkpoint is
            damaged or does not tell all that is needed, or an override is wrong.
        FileNotFoundError: If there is no such checkpoint.
        ImportError: If a library for this kind of file is not installed.
    """
    out = Path(out)
    _check_out(out, layout)
    source = checkpoint_source(source)
    with naming_wrong_values(overrides):
        model, report = checkpoint.load(source, **overrides)
    said = []
    with saying_warnings(said.append):
        if layout is not None:
            keras_vit.to_checkpoint(model, out, layout)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as path:
                model.save(path)
    return report, [*sentences(report), *said]


def _check_out(out, layout):
    if layout not in (*LAYOUTS, None):
        raise ValueError(unknown("layout", layout, LAYOUTS))
    if layout is None and out.suffix != ".keras":
        raise ValueError(
            f"OUT must end in .keras, got {str(out)!r}; --layout timm or --layout hf "
            "writes a .safetensors file or a folder."
        )
    other = (*SUFFIXES, ".keras", ".h5")
    if layout is not None and out.suffix != ".safetensors" and out.suffix in other:
        raise ValueError(
            f"OUT must be a folder or end in .safetensors with --layout {layout}, got "
            f"{str(out)!r}."
        )


def inspect(source: str, **overrides) -> keras_vit.CheckpointReport:
    """`keras_vit.inspect_checkpoint`, of runs too.

    Raises:
        The same as `convert`.
    """
    with naming_wrong_values(overrides):
        return keras_vit.inspect_checkpoint(checkpoint_source(source), **overrides)


def sentences(report: keras_vit.CheckpointReport) -> list[str]:
    """What a report assumes, notes, and finds fresh or left out, each one sentence."""
    values = {**report.arguments, "table_grid": report.table_grid}
    told = [
        f"Assumed: {name}={values.get(name)!r}, {why}."
        for name, why in report.assumed.items()
    ]
    for name, text in report.rows():
        if name in ("note", "fresh", "left out"):
            told.append(f"{name.capitalize()}: {text}.")
    return told


@contextmanager
def saying_warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Give the text of each warning to `say`, when the block is done.

    A warning of Python names a file and a line, which is not what the user of a command
    line can mend.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            say(str(warning.message))
        else:
            warnings.showwarning(
                warning.message, warning.category, warning.filename, warning.lineno
            )


@contextmanager
def naming_wrong_values(values: Mapping[str, Any]) -> Iterator[None]:
    """Make one sentence of what Python says of a value of a wrong type.

    Raises:
        ValueError: Instead of a TypeError, where there are values.
    """
    try:
        yield
    except TypeError as error:
        if not values:
            raise
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"A value has the wrong type, of {given}: {error}") from error


def model_builder(
    recipe: Recipe, labels: Sequence[str], say: Callable[[str], None]
) -> Callable[[], keras.Model]:
    """What `training.fit` calls to build the model of a recipe, for a command line.

    Args:
        recipe: Which model.
        labels: Names of the classes.
        say: Is given the text of each warning, such as that of a fresh head.
    """

    def build_model():
        with saying_warnings(say), naming_wrong_values(recipe.model):
            return recipe.build_model(len(labels), labels)

    return build_model
