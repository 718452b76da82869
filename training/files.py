"""Files that are there as a whole or not at all, and which of them is meant."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; afterwards it takes the place of `path` at once.

    Killed in between, it leaves a hidden file `.STEM.PROCESS.SUFFIX` behind.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """SHA-256 of what a file holds, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_file(path: Path) -> tuple[Path, list[str] | None]:
    """The `.keras` file itself, or the last one of a run and the labels of the run.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no run directory or model file {path}.")
        return path, None
    run = path / "run.json"
    if not (run.is_file() and (path / "last.keras").is_file()):
        raise FileNotFoundError(
            f"{path} must be a run directory with run.json and last.keras."
        )
    return path / "last.keras", json.loads(run.read_text())["labels"]
