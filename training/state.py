"""`state.npz`, from which a run goes on: checked when it is read, and kept twice.

    history                     JSON, a row for each epoch that is done
    model/00000, ...            variables of the model and of its seed generators
    optimizer/00000, ...        those of the optimizer
    partial, metrics/00000, ... only in the middle of an epoch: JSON of how many of its
                                steps are done and in how many seconds, and the
                                variables of its metrics

The last bytes of the file are the SHA-256 of all bytes before them. The state that was
there before is kept as `state.previous.npz`.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from keras_vit.model_file import replacing

STATE, PREVIOUS = "state.npz", "state.previous.npz"
DIGEST_BYTES = 64  # hexadecimal, at the end
BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a run has come.

    Args:
        history: A row for each epoch that is done.
        step: Steps of the next epoch that are done.
        seconds: How long they took.
    """

    history: tuple[dict, ...] = ()
    step: int = 0
    seconds: float = 0.0

    @property
    def epochs(self) -> int:
        """Number of epochs that are done."""
        return len(self.history)

    def __str__(self):
        if self.step:
            return f"step {self.step} of epoch {self.epochs + 1}"
        return f"epoch {self.epochs}"


def write_state(run_dir: Path, place: Place, arrays: dict[str, np.ndarray]) -> None:
    """Write `state.npz`; the one that is there becomes `state.previous.npz`.

    Killed at any moment, it leaves at least one of the two whole.
    """
    texts = {"history": json.dumps(place.history)}
    if place.step:
        texts["partial"] = json.dumps({"step": place.step, "seconds": place.seconds})
    with replacing(run_dir / STATE, run_dir / PREVIOUS) as path:
        np.savez(path, **texts, **arrays)
        with zipfile.ZipFile(path, "a") as file:
            file.comment = bytes(DIGEST_BYTES)
        with path.open("r+b") as file:
            digest = _digest(file)
            file.seek(-DIGEST_BYTES, os.SEEK_END)
            file.write(digest)


def find_state(run_dir: Path) -> tuple[Path | None, str]:
    """The newest state that is whole.

    Returns:
        `state.npz` or `state.previous.npz`, or None where there is neither; with the
        previous one, what is wrong with the other.

    Raises:
        ValueError: If there are some and none is whole.
    """
    wrong = {}
    for path in (run_dir / STATE, run_dir / PREVIOUS):
        if not path.exists():
            continue
        damage = _damage(path)
        if not damage:
            return path, "".join(wrong.values()) or "it is missing"
        wrong[path] = damage
    if not wrong:
        return None, ""
    path, damage = next(iter(wrong.items()))
    also, them = ("So is the previous one. ", "both") if len(wrong) > 1 else ("", "it")
    raise ValueError(
        f"{path} is damaged ({damage}). {also}Delete {them} to start the run again."
    )


def read_state(path: Path | None) -> tuple[Place, dict[str, np.ndarray]]:
    """How far a run has come, and its variables, as `find_state` has found them."""
    place = read_place(path)
    if path is None:
        return place, {}
    with np.load(path) as file:
        return place, {key: file[key] for key in file.files if "/" in key}


def read_place(path: Path | None) -> Place:
    """How far a run has come."""
    if path is None:
        return Place()
    with np.load(path) as file:
        partial = json.loads(str(file["partial"])) if "partial" in file else {}
        return Place(tuple(json.loads(str(file["history"]))), **partial)


def keep_whole(run_dir: Path) -> Place:
    """Put the previous state, if the run goes on from it, in the place of the other.

    The next state that is written would replace it otherwise.

    Returns:
        How far the run has come.

    Raises:
        ValueError: As `find_state`.
    """
    path, _ = find_state(run_dir)
    if path == run_dir / PREVIOUS:
        path = path.replace(run_dir / STATE)
    return read_place(path)


def _damage(path):
    """What is wrong with a file; empty if it is whole."""
    try:
        with path.open("rb") as file:
            digest = _digest(file)
            same = file.read() == digest
    except OSError as error:
        return str(error)
    return "" if same else "its content does not have its checksum"


def _digest(file):
    """SHA-256 of what an open file holds before its own, in hexadecimal digits."""
    size = os.fstat(file.fileno()).st_size - DIGEST_BYTES
    digest = hashlib.sha256()
    for start in range(0, size, BLOCK_BYTES):
        digest.update(file.read(min(BLOCK_BYTES, size - start)))
    return digest.hexdigest().encode()
