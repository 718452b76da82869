"""Everything that an exported model promises, checked on the artifact itself."""

import base64
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError, strings

JSON_DTYPES = ("DT_FLOAT", "DT_INT32", "DT_INT64", "DT_BOOL", "DT_STRING")
FORBIDDEN = ("Xla", "_Xla", "PyFunc", "EagerPyFunc", "Random", "StatelessRandom")
CONTRACT = {
    "serving_default": ({"image_bytes"}, {"probabilities", "classes", "scores"}),
    "image_bytes": ({"image_bytes"}, {"probabilities", "classes", "scores"}),
    "images": ({"images"}, {"logits", "probabilities"}),
}


CONTRACT_SHAPES = {  # enough of a description to count the hostile requests
    "images": {"inputs": {"images": {"shape": [-1, -1, -1, 3]}}},
    "image_bytes": {},
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise: what was checked, whether it holds, and the figure."""

    name: str
    ok: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The checks of an artifact."""

    directory: Path
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every promise holds."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"ok": self.ok, "checks": [dataclasses.asdict(x) for x in self.checks]}

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok  ' if x.ok else 'FAIL'} {x.name}: {x.detail}" for x in self.checks
        )


def verify(directory: str | Path, *, progress: bool = True) -> Report:
    """Check a version directory in the TensorFlow C++ session, XLA forbidden.

    That it loads; signatures and JSON-safe types; no op that a stock server lacks;
    weights stored once; the logits of the backend that trained it; the answer for an
    encoded file; and that no malformed request takes the process down.

    Args:
        directory: The version directory, which holds `saved_model.pb`.
        progress: Whether to show a progress bar.

    Returns:
        The checks; `report.ok` tells whether all hold.

    Raises:
        FileNotFoundError: If there is no `saved_model.pb`.
    """
    directory = Path(directory)
    if not (directory / "saved_model.pb").is_file():
        raise FileNotFoundError(
            f"{directory} must be a version directory with a saved_model.pb."
        )
    checks = []
    bar = tqdm(
        _checks(directory),
        desc="verify",
        unit=" checks",
        total=20,
        disable=not progress,
    )
    with bar:
        for check in bar:
            checks.append(check)
        bar.total = len(checks)
        bar.refresh()
    return Report(directory, tuple(checks))


def _checks(directory: Path) -> Iterator[Check]:
    try:
        runtime = Runtime(directory)
    except (StatusError, RuntimeCrashError) as error:
        yield Check("loads in the C++ runtime", False, str(error))
        return
    with runtime:
        yield Check("loads in the C++ runtime", True, "XLA forbidden, as in the server")
        yield _check_signatures(runtime)
        yield _check_ops(runtime)
        manifest, check = _read_manifest(directory)
        yield check
        if manifest is not None:
            yield _check_weights(directory, manifest)
            yield from _check_parity(runtime, manifest)
    yield from _check_hostile(directory, runtime.signatures)


def _check_signatures(runtime: Runtime) -> Check:
    name = "signatures"
    for signature, (inputs, outputs) in CONTRACT.items():
        found = runtime.signatures.get(signature)
        if found is None:
            return Check(name, False, f"{signature} is missing")
        names = set(found["inputs"]), set(found["outputs"])
        if names != (inputs, outputs):
            return Check(name, False, f"{signature} has {names}")
        for key, x in {**found["inputs"], **found["outputs"]}.items():
            if x["dtype"] not in JSON_DTYPES:
                return Check(
                    name, False, f"{signature} {key} is {x['dtype']}, not JSON"
                )
            if not x["shape"] or x["shape"][0] != -1:
                return Check(name, False, f"{signature} {key} has a fixed batch")
    return Check(name, True, ", ".join(CONTRACT))


def _check_ops(runtime: Runtime) -> Check:
    bad = [op for op in runtime.ops if op.startswith(FORBIDDEN)]
    detail = (
        f"not on a stock server: {', '.join(bad)}" if bad else f"{len(runtime.ops)} ops"
    )
    return Check("ops", not bad, detail)


def _read_manifest(directory: Path) -> tuple[dict | None, Check]:
    path = directory / "assets.extra" / "manifest.json"
    try:
        return json.loads(path.read_text()), Check("manifest", True, "readable")
    except (OSError, ValueError) as error:
        return None, Check("manifest", False, f"{path}: {error}")


def _check_weights(directory: Path, manifest: dict) -> Check:
    files = (directory / "variables").glob("*")
    stored = sum(path.stat().st_size for path in files)
    ratio = stored / manifest["weight_bytes"]
    limit = 1.02 * manifest["weight_bytes"] + 100_000  # names and checksums
    detail = f"{stored:,} bytes, {ratio:.2f} x the weights"
    return Check("weights stored once", stored <= limit, detail)


def _check_parity(runtime: Runtime, manifest: dict) -> Iterator[Check]:
    reference = manifest["reference"]
    images = reference_images(reference["seed"], reference["shape"]).astype("float32")
    expected = np.asarray(reference["logits"])
    bound = manifest["tolerance"] * max(1.0, np.abs(expected).max())
    name = f"logits of {manifest['trained_with']}"
    yield _compare(
        name, bound, expected, lambda: runtime.run("images", images=images)["logits"]
    )

    file = manifest["reference_file"]
    data = strings([base64.b64decode(file["png"])])
    expected = np.asarray([file["probabilities"]])
    yield _compare(
        "probabilities of a file",
        manifest["tolerance"],
        expected,
        lambda: runtime.run("image_bytes", image_bytes=data)["probabilities"],
    )


def reference_images(seed: int, shape: Sequence[int]) -> np.ndarray:
    """The images that parity is measured on: uint8 noise of a seed."""
    return np.random.default_rng(seed).integers(0, 256, shape, "uint8")


def _compare(name, bound, expected, run) -> Check:
    try:
        difference = np.abs(run() - expected).max()
    except (StatusError, RuntimeCrashError) as error:
        return Check(name, False, str(error))
    detail = f"difference {difference:.2g}, bound {bound:.2g}"
    return Check(name, bool(difference <= bound), detail)


def hostile_requests(signatures: dict) -> Iterator[tuple[str, str, dict, bool]]:
    """Requests that no server should meet and every server does.

    Yields:
        Name, signature, inputs, and whether an answer is acceptable: of these an error
        status always is; where it is not, an answer is nonsense.
    """
    if "images" in signatures:
        shape = signatures["images"]["inputs"]["images"]["shape"]
        height, width = ((32 if side < 0 else side) for side in shape[1:3])
        fixed = shape[1] > 0
        pixels = {
            "of rank 0": ((), False),
            "of rank 1": ((3,), False),
            "of rank 2": ((height, width), False),
            "of rank 3": ((height, width, 3), False),
            "of rank 5": ((1, 1, height, width, 3), False),
            "of 8 pixels more": ((16, height + 8, width + 8, 3), not fixed),
            "of no pixels": ((1, 0, 0, 3), False),
            "of one channel": ((2, height, width, 1), False),
            "none": ((0, height, width, 3), True),
        }
        for name, (shape, acceptable) in pixels.items():
            inputs = {"images": np.full(shape, 100, "float32")}
            yield f"images {name}", "images", inputs, acceptable
        for dtype in ("float64", "uint8", "int64"):
            inputs = {"images": np.zeros((1, height, width, 3), dtype)}
            yield f"images of {dtype}", "images", inputs, False
    if "image_bytes" in signatures:
        files = {
            "garbage": strings([b"not an image"]),
            "an empty file": strings([b""]),
            "a matrix": strings([b"x"]).reshape(1, 1),
            "a scalar": strings([b"x"]).reshape(()),
        }
        for name, data in files.items():
            yield f"image_bytes {name}", "image_bytes", {"image_bytes": data}, False
        yield "image_bytes none", "image_bytes", {"image_bytes": strings([])}, True


def _check_hostile(directory: Path, signatures: dict) -> Iterator[Check]:
    """Send each request; a process that dies is replaced, so each is on its own."""
    runtime = Runtime(directory)
    try:
        for name, signature, inputs, acceptable in hostile_requests(signatures):
            try:
                outputs = runtime.run(signature, **inputs)
                rows = next(iter(inputs.values())).shape[:1]
                right = all(x.shape[:1] == rows for x in outputs.values())
                detail = "rows out = rows in" if right else "rows out != rows in"
                yield Check(name, acceptable and right, detail)
            except StatusError as error:
                yield Check(name, True, error.code)
            except RuntimeCrashError as error:
                yield Check(name, False, str(error))
                runtime.close()
                runtime = Runtime(directory)
    finally:
        runtime.close()
