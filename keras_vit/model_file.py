"""Models in files, and files that are there as a whole or not at all."""

import contextlib
import errno
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator
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
    except (
        zipfile.BadZipFile,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} cannot be loaded: {reason}") from error


def sha256(path: str | Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Give a path to write to; afterwards it takes the place of `path` at once.

    When it returns, both the file and its name are on the disk. Killed in between, it
    leaves a hidden file `.STEM.PROCESS.SUFFIX` behind; `remove_leftovers` removes it.

    Args:
        path: What is written.
        previous: Where the file that is there goes, in the same folder; None for
            nowhere. Killed between the two renamings, `path` is missing.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers into `folder` that were killed left behind."""
    for path in folder.glob(".*.*"):
        if re.fullmatch(r"\..+\.\d+(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


def _sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folder.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
