"""Where the program `keras-vit` starts, and how it reads its arguments.

It runs `keras_vit/__main__.py` without importing `keras_vit` first: Keras and
TensorFlow take seconds, which `--help` need not wait for, and TensorFlow reads how much
to log when it is imported.
"""

import importlib.util
import json
import runpy
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = importlib.util.find_spec("keras_vit").origin
    runpy.run_path(str(Path(package).with_name("__main__.py")), run_name="__main__")


def parse_changes(changes: list[str]) -> dict:
    """`["epochs=3", "pool=mean"]` to values: JSON where it is, else text."""
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals):
            raise ValueError(f"--set must be NAME=VALUE, got {change!r}.")
        try:
            values[name] = json.loads({"None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    return values


def parse_size(text: str) -> tuple[int, int]:
    """`"96"` or `"64x96"` to height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(x.isdecimal() and int(x) > 0 for x in sides):
        raise ValueError(f"--image-size must be N or HxW, in pixels, got {text!r}.")
    return int(sides[0]), int(sides[-1])
