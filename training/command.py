"""Where the program `keras-vit` starts, and how it reads its arguments.

It runs `keras_vit/__main__.py` without importing `keras_vit` first: Keras and
TensorFlow take seconds, which `--help` need not wait for, and TensorFlow reads how much
to log when it is imported.
"""

import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = importlib.util.find_spec("keras_vit").origin
    runpy.run_path(str(Path(package).with_name("__main__.py")), run_name="__main__")


def parse_changes(changes: list[str], image_size: str | None = None) -> dict:
    """`["epochs=3", "pool=mean"]` to values: JSON where it is, else text.

    A list becomes a tuple, as in the rows of `VARIANTS`.

    Args:
        changes: What `--set` was given.
        image_size: What `--image-size` was given, which is one of the values.

    Raises:
        ValueError: If one is not NAME=VALUE, or the size is none or given twice.
    """
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals):
            raise ValueError(f"--set must be NAME=VALUE, got {change!r}.")
        try:
            value = json.loads({"None": "null"}.get(text, text))
        except ValueError:
            value = text
        values[name] = tuple(value) if isinstance(value, list) else value
    if image_size is not None:
        if "image_size" in values:
            raise ValueError("--image-size and --set image_size=... are one; give one.")
        values["image_size"] = parse_size(image_size)
    return values


def parse_size(text: str) -> tuple[int, int]:
    """`"96"` or `"64x96"` to height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(x.isdecimal() and int(x) > 0 for x in sides):
        raise ValueError(f"--image-size must be N or HxW, in pixels, got {text!r}.")
    return int(sides[0]), int(sides[-1])


def load_tensorflow() -> None:
    """Import TensorFlow without the lines that it logs before it can be told not to.

    Raises:
        RuntimeError: If it is not installed.
    """
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as silence:
        try:
            sys.stderr.flush()
            os.dup2(silence.fileno(), 2)
            import tensorflow as tf

            tf.config.list_physical_devices()
        except ImportError as error:
            raise RuntimeError(
                f'{error}. The command line needs pip install "keras-vit[demo]"'
            ) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
