"""A version in an object store: whole before a server can load it."""

import hashlib
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from export.versions import parse_number, problem, publish, staging

LAST = "saved_model.pb"  # what a server looks for


def upload(version: str | Path, url: str, *, progress: bool = True) -> str:
    """Copy a version directory to `URL/NUMBER`, `saved_model.pb` last.

    A store has no rename. A server that sees the number begins to load, fails without
    `saved_model.pb`, and after six tries in as many minutes gives the version up. So
    the files go to `URL/.uploading-NUMBER` first, however long that takes, and from
    there within the store. Called again after a failure, it goes on: what is there
    with the same SHA-256 is not sent again.

    Args:
        version: The version directory; its name is the number.
        url: Where the versions of the model are: `s3://`, `gs://` or whatever fsspec
            knows, with its library (s3fs, gcsfs) installed; or a folder.
        progress: Whether to show a progress bar.

    Returns:
        The URL of the version.

    Raises:
        FileExistsError: If the store has another version of this number, or the folder
            any.
        ValueError: If it is no whole version directory.
        OSError: If the store does not have all bytes in the end.
    """
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    version = Path(version).resolve()
    number = parse_number(version.name)
    wrong = "its name is no number" if number is None else problem(version)
    if wrong:
        raise ValueError(f"{version} must be a whole version directory: {wrong}.")
    store, base = fsspec.url_to_fs(url)
    if isinstance(store, LocalFileSystem):
        return str(_copy(version, Path(base), number))
    store.invalidate_cache()
    base = base.rstrip("/")
    paths = [x for x in sorted(version.rglob("*")) if x.is_file()]
    names = [str(x.relative_to(version)) for x in paths]
    names.sort(key=lambda name: name == LAST)
    if store.exists(f"{base}/{number}/{LAST}"):
        _check_equal(store, f"{base}/{number}", version, names)
        return f"{url.rstrip('/')}/{number}"
    staged = f"{base}/.uploading-{number}"
    total = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=total, unit="B", unit_scale=True, disable=not progress)
    with bar:
        for name in names:
            bar.set_description(name)
            _send(store, version / name, f"{staged}/{name}")
            bar.update((version / name).stat().st_size)
        bar.set_description("publish")
        for name in names:
            store.copy(f"{staged}/{name}", f"{base}/{number}/{name}")
            _check_size(store, version / name, f"{base}/{number}/{name}")
        store.rm(staged, recursive=True)
        bar.set_description("uploaded")
    return f"{url.rstrip('/')}/{number}"


def _copy(version: Path, directory: Path, number: int) -> Path:
    """To a folder, which has renames."""
    with staging(directory) as target:
        shutil.copytree(version, target)
        return publish(target, directory, number)


def _send(store, path: Path, remote: str) -> None:
    if not _is_there(store, path, remote):
        store.put_file(str(path), remote)
    _check_size(store, path, remote)


def _is_there(store, path: Path, remote: str) -> bool:
    if not store.exists(remote) or store.size(remote) != path.stat().st_size:
        return False
    with store.open(remote, "rb") as there, path.open("rb") as here:
        return _digest(there) == _digest(here)


def _digest(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _check_size(store, path: Path, remote: str) -> None:
    store.invalidate_cache()
    size = store.size(remote)
    if size != path.stat().st_size:
        raise OSError(
            f"{remote} must have the {path.stat().st_size} bytes of {path}, it has "
            f"{size}; upload again."
        )


def _check_equal(store, remote: str, version: Path, names: list[str]) -> None:
    for name in names:
        if not _is_there(store, version / name, f"{remote}/{name}"):
            raise FileExistsError(
                f"A version is never changed: {remote} exists, and its {name} is not "
                f"that of {version}."
            )
