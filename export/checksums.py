"""SHA-256 of the files of a version, in `assets.extra/SHA256SUMS`.

`sha256sum --check` reads it too. What is written after it is not counted: itself, and
the report of `verify`.
"""

import hashlib
from pathlib import Path

NAME = "assets.extra/SHA256SUMS"
UNCOUNTED = {NAME, "assets.extra/report.json"}


def write_checksums(version: Path) -> None:
    """Write the SHA-256 of every file."""
    names = sorted(_files(version) - UNCOUNTED)
    lines = [f"{_digest(version / name)}  {name}\n" for name in names]
    (version / NAME).write_text("".join(lines))


def flaws(version: Path) -> dict[str, list[str]]:
    """Names of the files that are `missing`, `damaged` or `foreign`, sorted.

    Raises:
        OSError: If the list of checksums is not there.
        ValueError: If it is no text.
    """
    lines = (version / NAME).read_text().splitlines()
    told = {name: digest for digest, _, name in (x.partition("  ") for x in lines)}
    found = _files(version)
    whole = sorted(found & told.keys())
    return {
        "missing": sorted(told.keys() - found),
        "damaged": [name for name in whole if _digest(version / name) != told[name]],
        "foreign": sorted(found - told.keys() - UNCOUNTED),
    }


def add(version: Path, name: str) -> None:
    """Write down one more file, or one that is another now.

    The list is written anew: it may be a link to that of another version.
    """
    path = version / NAME
    lines = [x for x in path.read_text().splitlines() if not x.endswith(f"  {name}")]
    lines.append(f"{_digest(version / name)}  {name}")
    path.unlink()
    path.write_text("\n".join(lines) + "\n")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(version: Path) -> set[str]:
    paths = (x for x in version.rglob("*") if x.is_file())
    return {x.relative_to(version).as_posix() for x in paths}
