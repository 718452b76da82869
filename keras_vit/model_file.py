"""Models in files."""

import zipfile
from pathlib import Path

import keras


def read_model(path: str | Path) -> keras.Model:
    """Load a `.keras` file, or say in one sentence why it cannot be loaded.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is damaged or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {path}.")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} must be a .keras file; it is damaged or another kind."
        )
    try:
        return keras.saving.load_model(path, compile=False)
    except (zipfile.BadZipFile, OSError, KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error
