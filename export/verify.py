"""Everything that an exported model promises, checked on the artifact itself."""

import base64
import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError, strings

JSON_DTYPES = ("DT_FLOAT", "DT_INT32", "DT_INT64", "DT_BOOL", "DT_STRING")
FORBIDDEN = ("Xla", "_Xla", "PyFunc", "EagerPyFunc", "Random", "StatelessRandom")
FILES, PIXELS = {"image_bytes"}, {"images"}
CONTRACTS = {
    "classification": {
        "serving_default": (FILES, {"probabilities", "classes", "scores"}),
        "image_bytes": (FILES, {"probabilities", "classes", "scores"}),
        "images": (PIXELS, {"logits", "probabilities"}),
    },
    "segmentation": {
        "serving_default": (FILES, {"label_map_bytes"}),
        "image_bytes": (FILES, {"label_map_bytes"}),
        "images": (PIXELS, {"label_map"}),
        "logits": (PIXELS, {"logits"}),
    },
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
        total=24,
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
    try:
        yield Check("loads in the C++ runtime", True, "XLA forbidden, as in the server")
        yield _check_signatures(runtime, contract_of(runtime.signatures))
        yield _check_ops(runtime)
        manifest, check = _read_manifest(directory)
        yield check
        if manifest is not None:
            yield _check_weights(directory, manifest)
            yield from _check_parity(runtime, manifest)
        for name, signature, inputs, acceptable in hostile_requests(runtime.signatures):
            if not runtime.is_alive:  # each request is on its own
                runtime.close()
                runtime = Runtime(directory)
            yield _check_request(runtime, name, signature, inputs, acceptable)
    finally:
        runtime.close()


def contract_of(signatures: dict) -> dict:
    """What the signatures must be: those of label maps, or of a classifier."""
    files = signatures.get("image_bytes", {"outputs": {}})
    is_dense = "label_map_bytes" in files["outputs"]
    return CONTRACTS["segmentation" if is_dense else "classification"]


def _check_signatures(runtime: Runtime, contract: dict) -> Check:
    name = "signatures"
    for signature, (inputs, outputs) in contract.items():
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
    return Check(name, True, ", ".join(contract))


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
    signature = "logits" if manifest["task"] == "segmentation" else "images"

    def logits():
        return sampled(runtime.run(signature, images=images)["logits"], reference)

    expected = np.asarray(reference["logits"])
    bound = manifest["tolerance"] * max(1.0, np.abs(expected).max())
    yield _compare(f"logits of {manifest['trained_with']}", bound, expected, logits)

    file = manifest["reference_file"]
    data = strings([base64.b64decode(file["png"])])
    if "label_map_bytes" in file:
        yield _compare_label_maps(
            file, lambda: runtime.run("image_bytes", image_bytes=data)
        )
        return
    yield _compare(
        "probabilities of a file",
        manifest["tolerance"],
        np.asarray([file["probabilities"]]),
        lambda: runtime.run("image_bytes", image_bytes=data)["probabilities"],
    )


def sampled(logits: np.ndarray, reference: dict) -> np.ndarray:
    """The logits that the manifest keeps: all of a classifier, some pixels of a map."""
    step = reference["step"]
    return logits[:, ::step, ::step] if logits.ndim == 4 else logits


def _compare_label_maps(file: dict, run) -> Check:
    from PIL import Image

    name, limit = "label map of a file", 0.001  # where two classes are all but equal
    try:
        found = run()["label_map_bytes"][0]
    except (StatusError, RuntimeCrashError) as error:
        return Check(name, False, str(error))
    encoded = (base64.b64decode(file["label_map_bytes"]), bytes(found))
    expected, found = (np.asarray(Image.open(io.BytesIO(x))) for x in encoded)
    if expected.shape != found.shape:
        return Check(name, False, f"size {found.shape}, must be {expected.shape}")
    differing = float((expected != found).mean())
    detail = f"{differing:.2%} of the pixels differ, bound {limit:.1%}"
    return Check(name, differing <= limit, detail)


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
    for signature, description in signatures.items():
        if "images" not in description["inputs"]:
            continue
        shape = description["inputs"]["images"]["shape"]
        for name, images, acceptable in _hostile_images(shape):
            yield f"{signature} {name}", signature, {"images": images}, acceptable
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


def _hostile_images(shape: Sequence[int]) -> Iterator[tuple[str, np.ndarray, bool]]:
    height, width = ((32 if side < 0 else side) for side in shape[1:3])
    shapes = {
        "of rank 0": ((), False),
        "of rank 1": ((3,), False),
        "of rank 2": ((height, width), False),
        "of rank 3": ((height, width, 3), False),
        "of rank 5": ((1, 1, height, width, 3), False),
        "of 8 pixels more": ((16, height + 8, width + 8, 3), shape[1] < 0),
        "of no pixels": ((1, 0, 0, 3), False),
        "of one channel": ((2, height, width, 1), False),
        "none": ((0, height, width, 3), True),
    }
    for name, (size, acceptable) in shapes.items():
        yield name, np.full(size, 100, "float32"), acceptable
    for dtype in ("float64", "uint8", "int64"):
        yield f"of {dtype}", np.zeros((1, height, width, 3), dtype), False


def _check_request(runtime, name, signature, inputs, acceptable) -> Check:
    try:
        outputs = runtime.run(signature, **inputs)
    except StatusError as error:
        return Check(name, True, error.code)
    except RuntimeCrashError as error:
        return Check(name, False, str(error))
    rows = next(iter(inputs.values())).shape[:1]
    right = all(x.shape[:1] == rows for x in outputs.values())
    detail = "rows out = rows in" if right else "rows out != rows in"
    return Check(name, acceptable and right, detail)
