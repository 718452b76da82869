"""Where the program `keras-vit` starts.

It runs `keras_vit/__main__.py` without importing `keras_vit` first: Keras and
TensorFlow take seconds, which `--help` need not wait for, and TensorFlow reads how much
to log when it is imported.
"""

import importlib.util
import runpy
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = importlib.util.find_spec("keras_vit").origin
    runpy.run_path(str(Path(package).with_name("__main__.py")), run_name="__main__")
