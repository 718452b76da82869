"""Everything that an exported model promises, checked on the artifact itself."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from export import checks
from export.checks import Artifact, Check
from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError

LOADS = "loads in the C++ runtime"


@dataclasses.dataclass(frozen=True)
class Report:
    """The checks of an artifact.

    Attributes:
        directory: The version directory.
        checks: What was checked.
        runtime: Version of the TensorFlow that ran it, "" where it did not load.
    """

    directory: Path
    checks: tuple[Check, ...]
    runtime: str = ""

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        checks = [dataclasses.asdict(x) for x in self.checks]
        return {"ok": self.ok, "tensorflow": self.runtime, "checks": checks}

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok  ' if x.ok else 'FAIL'} {x.name}: {x.detail}" for x in self.checks
        )


def verify(
    directory: str | Path, *, runtime: str | Path = sys.executable, progress=True
) -> Report:
    """Check a version directory in the TensorFlow C++ session, XLA forbidden.

    The bytes of every file; that it loads; signatures and JSON-safe types; no op that
    a stock server lacks; weights stored once; the logits of the backend that trained
    it, and the answer for a file; that rows do not depend on each other, damaged ones
    neither; that a huge image costs no memory; every warm-up record; and that no
    malformed request takes the process down.

    Args:
        directory: The version directory, which holds `saved_model.pb`.
        runtime: A Python interpreter whose TensorFlow is used: any release from 2.17
            on, with nothing else of this package.
        progress: Whether to show a progress bar.

    Returns:
        The checks; `report.ok` tells whether all hold.

    Raises:
        FileNotFoundError: If there is no `saved_model.pb`, or no such interpreter.
    """
    directory = Path(directory)
    if not (directory / "saved_model.pb").is_file():
        raise FileNotFoundError(
            f"{directory} must be a version directory with a saved_model.pb."
        )
    found, versions = [], []
    with tqdm(desc="verify", unit=" checks", disable=not progress) as bar:
        for check in _all_checks(directory, str(runtime), versions, bar):
            found.append(check)
            bar.update()
        bar.total = len(found)
        bar.refresh()
    return Report(directory, tuple(found), "".join(versions))


def _all_checks(directory, python, versions, bar) -> Iterator[Check]:
    manifest, check = checks.manifest_of(directory)
    yield check
    yield checks.of_files(directory)
    try:
        runtime = Runtime(directory, python)
    except (StatusError, RuntimeCrashError) as error:
        yield Check(LOADS, False, str(error))
        return
    versions.append(runtime.tensorflow)
    yield Check(LOADS, True, f"TensorFlow {runtime.tensorflow}, XLA forbidden")
    artifact = Artifact(directory, manifest, runtime)
    bar.total = 12 + 2 * len(runtime.signatures)
    with runtime:
        yield from checks.of_graph(artifact)
        yield from checks.of_answers(artifact)
        yield artifact.check("warm-up", lambda: _replayed(artifact))
        for signature in runtime.signatures:
            yield checks.malformed(artifact, signature)


def _replayed(artifact: Artifact) -> tuple[bool, str]:
    from export.warmup import replayed  # the messages, which few commands need

    return replayed(artifact.runtime, artifact.directory, artifact.manifest)
