"""Renames that a crash cannot split: onto nothing, and in exchange."""

import contextlib
import ctypes
import errno
import os
from pathlib import Path

NO_REPLACE, EXCHANGE = 1, 2  # flags of renameat2(2)
_HERE = -100  # AT_FDCWD: paths are as everywhere else
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that is not taken, not even by an empty folder.

    Raises:
        FileExistsError: If the name is taken.
        OSError: If the file system refuses otherwise.
    """
    if _renameat2(source, target, NO_REPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise FileExistsError(errno.EEXIST, error.strerror, str(target)) from error


def replace(source: Path, target: Path) -> None:
    """Put a folder in the place of another, which may not exist.

    Where the file system can, both change places at once, and the old one is where the
    new one was. Where it cannot, the old one steps aside first, to the folder of
    `source`, and for a moment there is none.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            rename_new(source, target)
            return
        if _renameat2(source, target, EXCHANGE):
            return
        os.rename(target, source.with_name("replaced"))


def sync(folder: Path) -> None:
    """Bring a folder and what is in it to the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Whether the system knows such a rename, and did it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    paths = (_HERE, os.fsencode(source), _HERE, os.fsencode(target))
    if function(*paths, ctypes.c_uint(flags)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(target))
