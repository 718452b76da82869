"""The folder of a model's versions: publish, roll back, prune. Without TensorFlow.

    models/digits/1/            a version, never changed once it is there
    models/digits/2/
    models/digits/bundle/       how to run a server on them (`export.bundle`)
    models/digits/.exporting-*  what is being written; no number, so no server sees it

A server looks at the names once a second and loads the highest number the moment that
it appears, whole or not. So a version is written under another name and gets its number
by one rename, and loses it by one before it is deleted.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from export import checksums
from export.rename import rename_new, sync, sync_one

EXPORTING, PRUNED = ".exporting-", ".pruned-"
NUMBER = re.compile(r"[ \t\n\v\f\r]*[+-]?[0-9]+[ \t\n\v\f\r]*")
EXTRA = "assets.extra"


@dataclasses.dataclass(frozen=True)
class Version:
    """A version directory.

    Attributes:
        number: What the server takes its name for.
        path: The directory.
    """

    number: int
    path: Path


def parse_number(name: str) -> int | None:
    """The number that a server reads in a name, as `absl::SimpleAtoi` does; or None.

    "007" is 7, and so are "+7" and " 7"; what does not fit in 64 bits is no number.
    """
    if not NUMBER.fullmatch(name):
        return None
    number = int(name)
    return number if -(2**63) <= number < 2**63 else None


def versions(directory: str | Path) -> list[Version]:
    """The versions in a folder, lowest first, as the server sees them.

    Of several names for one number ("1" and "01") the server takes the last in
    alphabetical order; `duplicates` tells of them.
    """
    found = {number: paths[-1] for number, paths in _numbered(directory).items()}
    return [Version(number, found[number]) for number in sorted(found)]


def duplicates(directory: str | Path) -> dict[int, list[str]]:
    """Numbers that several names stand for, and these names; the last one is served."""
    return {
        number: [path.name for path in paths]
        for number, paths in _numbered(directory).items()
        if len(paths) > 1
    }


def _numbered(directory: str | Path) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = {}
    directory = Path(directory)
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        number = parse_number(path.name)
        if number is not None:
            found.setdefault(number, []).append(path)
    return found


# --- publish ---


@contextlib.contextmanager
def staging(directory: str | Path) -> Iterator[Path]:
    """A place beside the versions where the next one is written; made if need be.

    It is locked while this process lives, and whatever is left in it goes away at the
    end; what a process that died left there, the next one removes.

    Yields:
        Path of the version to be written, which does not exist yet.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    while True:
        folder = directory / f"{EXPORTING}{uuid.uuid4().hex}"
        folder.mkdir()
        handle = _lock(folder, or_without=True)
        if handle is None:
            continue  # between these two lines another process took it for a leftover
        if (folder / "lock").exists():
            break
        os.close(handle)
    try:
        yield folder / "version"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def sweep(directory: Path) -> None:
    """Remove what dead processes left: of an export, of a prune."""
    for folder in directory.glob(f"{EXPORTING}*"):
        handle = _lock(folder)
        if handle is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)
    for folder in directory.glob(f"{PRUNED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path, or_without: bool = False) -> int | None:
    """Descriptor that holds a folder's lock until it is closed; None if another has it.

    Some file systems know no locks: there nobody's leftovers are removed.
    """
    try:
        handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    except OSError:  # it is gone
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if or_without and not isinstance(error, BlockingIOError):
            return handle
        os.close(handle)
        return None
    return handle


def publish(target: Path, directory: str | Path, version: int | None = None) -> Path:
    """Give a written version its number, by one rename.

    Args:
        target: What was written, on the same file system (`staging`).
        directory: Folder of the versions.
        version: The number; None for the next one, which of two at once each gets
            another of.

    Returns:
        The version directory.

    Raises:
        FileExistsError: If the version exists; versions are never changed.
    """
    directory = Path(directory)
    sync(target)
    while True:
        taken = [x.number for x in versions(directory)]
        number = max([0, *taken]) + 1 if version is None else version
        if number in taken:
            raise FileExistsError(
                f"A version is never changed: {directory} has {number} already; it has "
                f"{', '.join(map(str, taken))}."
            )
        try:
            rename_new(target, directory / str(number))
        except FileExistsError:  # another process was quicker
            continue
        sync_one(directory)
        return directory / str(number)


# --- what a version is ---


def problem(path: Path) -> str | None:
    """What is wrong with a version's files, in words; None if nothing is.

    Compares them with `assets.extra/SHA256SUMS`, where there is one.
    """
    for name in ("saved_model.pb", "variables/variables.index"):
        if not (path / name).is_file():
            return f"{name} is missing"
    if not list(path.glob("variables/variables.data-*")):
        return "variables/variables.data-* is missing"
    if (path / checksums.NAME).is_file():
        found = checksums.flaws(path)
        for name in found["missing"]:
            return f"{name} is missing"
        for name in found["damaged"]:
            return f"{name} is not what was exported (its SHA-256 differs)"
    return None


def describe(version: Version) -> dict:
    """What a version's own files tell: date, size, model, whether it was verified."""
    manifest, report = (
        _json(version.path / EXTRA / name) for name in ("manifest.json", "report.json")
    )
    sizes = [x.stat().st_size for x in version.path.rglob("*") if x.is_file()]
    return {
        "number": version.number,
        "date": datetime.fromtimestamp(version.path.stat().st_mtime),
        "bytes": sum(sizes),
        "model": manifest.get("model"),
        "verified": report.get("ok"),
        "copy_of": _json(version.path / EXTRA / "rollback.json").get("copy_of"),
    }


def served(directory: str | Path) -> dict[int, list[str]]:
    """Numbers that a server on this folder serves, each with its labels.

    The newest one, or what `bundle/models.config` pins.

    Raises:
        ValueError: If that file cannot be read as the server would.
    """
    numbers = [x.number for x in versions(directory)]
    config = Path(directory) / "bundle" / "models.config"
    text = config.read_text() if config.is_file() else ""
    if not re.search(r"\b(specific|all|num_versions)\b", text):
        return {number: [] for number in numbers[-1:]}
    found: dict[int, list[str]] = {}
    for model in parse_config(text, config).model_config_list.config:
        policy = model.model_version_policy
        chosen = numbers[-max(1, policy.latest.num_versions) :]
        if policy.HasField("specific"):
            chosen = [x for x in numbers if x in policy.specific.versions]
        elif policy.HasField("all"):
            chosen = numbers
        for number in chosen:
            found.setdefault(number, [])
        for label, number in sorted(model.version_labels.items()):
            if number in found:
                found[number].append(label)
    return found


def parse_config(text: str, path: Path):
    """The ModelServerConfig message of a `models.config`.

    Raises:
        ValueError: If it is none.
        ImportError: If tensorflow-serving-api is not installed.
    """
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    try:
        return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    except text_format.ParseError as error:
        raise ValueError(
            f"{path} must be a ModelServerConfig in text form: {error}."
        ) from error


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# --- back, and away ---


def rollback(directory: str | Path, to: int | None = None) -> Path:
    """Serve an older version again: publish a copy of it as the newest one.

    A server on its default policy serves the highest number, so this works with every
    server, without its configuration, and by the one rename that publishes. Files are
    hard links where the file system has them. `assets.extra/rollback.json` records it.

    Args:
        directory: Folder of the versions.
        to: The version; None for the one before that which is served now. Of a
            version that is itself a copy, the one before the original.

    Returns:
        The new version directory.

    Raises:
        ValueError: If there is no such older version, or it is damaged.
    """
    directory = Path(directory)
    found = {x.number: x for x in versions(directory)}
    numbers = ", ".join(map(str, sorted(found))) or "none"
    newest = max(found, default=None)
    if to is None and newest is not None:
        older = [x for x in found if x < _original(found[newest])]
        to = max(older, default=None)
        if to is None:
            raise ValueError(
                f"There must be a version older than {_original(found[newest])} to "
                f"roll back to; {directory} has {numbers}."
            )
    if to not in found or to == newest:
        raise ValueError(
            f"A rollback goes to an older version than the newest; {directory} has "
            f"{numbers}, got {to}."
        )
    wrong = problem(found[to].path)
    if wrong:
        raise ValueError(f"Version {to} of {directory} is damaged: {wrong}.")
    with staging(directory) as target:
        shutil.copytree(found[to].path, target, copy_function=_link)
        os.utime(target)
        _record(target, found[to], newest)
        return publish(target, directory)


def _original(version: Version) -> int:
    """The version that this one is a copy of, itself if it is none."""
    record = _json(version.path / EXTRA / "rollback.json")
    return record.get("original", version.number)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no such links here
        shutil.copy2(source, target)


def _record(target: Path, version: Version, newest: int) -> None:
    """Write down the rollback, into files of its own and never through a link."""
    extra = target / EXTRA
    extra.mkdir(exist_ok=True)
    record = {
        "copy_of": version.number,
        "original": _original(version),
        "instead_of": newest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    path = extra / "rollback.json"
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    if (target / checksums.NAME).is_file():
        checksums.add(target, f"{EXTRA}/rollback.json")


def prune(directory: str | Path, keep: int = 3) -> list[int]:
    """Delete old versions; never one that is served, nor the newest.

    Each loses its number by a rename before the first of its files goes.

    Args:
        directory: Folder of the versions.
        keep: How many of the newest stay, 1 at least.

    Returns:
        The numbers of those deleted.

    Raises:
        ValueError: If `keep` is less than 1, or `bundle/models.config`, which may pin
            versions, cannot be read.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}.")
    directory = Path(directory)
    kept = {x.number for x in versions(directory)[-keep:]} | set(served(directory))
    old = {n: paths for n, paths in _numbered(directory).items() if n not in kept}
    for path in (path for n in sorted(old) for path in old[n]):
        hidden = directory / f"{PRUNED}{uuid.uuid4().hex}"
        os.rename(path, hidden)
        sync_one(directory)
        if hidden.is_dir() and not hidden.is_symlink():
            shutil.rmtree(hidden, ignore_errors=True)  # another may sweep it meanwhile
        else:
            hidden.unlink(missing_ok=True)
    sweep(directory)
    return sorted(old)
