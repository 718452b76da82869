"""Which file is meant: of a run, of a checkpoint."""

import json
from pathlib import Path

from keras_vit.checkpoint_files import SUFFIXES
from keras_vit.model_file import sha256


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


def checkpoint_source(source: str) -> str:
    """What `from_checkpoint` takes for a source that may be a run: its `last.keras`.

    Raises:
        FileNotFoundError: If it is a run without a model.
    """
    if not (Path(source).expanduser() / "run.json").is_file():
        return source
    return str(model_file(Path(source).expanduser())[0])


def checkpoint_identity(source: str) -> dict:
    """Which checkpoint a source is now: what a run keeps of it in `run.json`.

    Returns:
        Its `path`, and the `sha256` of the file, or of the weights and the JSON in a
        folder by their names; of a model on the Hugging Face hub its `revision`.

    Raises:
        OSError: If there is none, or the hub cannot be reached.
    """
    source = checkpoint_source(source)
    if source.startswith("hf:"):
        from keras_vit.checkpoint_hub import download

        return {"path": source, "revision": download(source).name}
    path = Path(source).expanduser()
    if path.is_file():
        return {"path": source, "sha256": sha256(path)}
    files = [x for x in sorted(path.iterdir()) if x.suffix in (*SUFFIXES, ".json")]
    return {"path": source, "sha256": {file.name: sha256(file) for file in files}}
