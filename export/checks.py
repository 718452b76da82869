"""The promises of an exported model, one function a promise; `export.verify` runs them.

Each looks at the artifact alone: at its files, or at what the C++ session answers.
"""

import base64
import dataclasses
import functools
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from export import checksums
from export.requests import SIDE, hostile, huge_png, mixed_files, sample
from export.runtime import Runtime, RuntimeCrashError
from export.session import StatusError, strings

JSON_DTYPES = ("DT_FLOAT", "DT_INT32", "DT_INT64", "DT_BOOL", "DT_STRING", "DT_UINT8")
FORBIDDEN = ("Xla", "_Xla", "PyFunc", "EagerPyFunc", "Random", "StatelessRandom")
FILES, PIXELS = {"image_bytes"}, {"images"}
BEST = {"probabilities", "classes", "scores", "valid"}
MAPS = {"label_map_bytes", "valid"}
CONTRACTS = {  # what every artifact of a task has, at least
    "classification": {
        "serving_default": (FILES, BEST),
        "strict": (FILES, BEST),
        "images": (PIXELS, {*BEST, "logits"}),
        "images_uint8": (PIXELS, {*BEST, "logits"}),
        "classify": ({"inputs"}, {"classes", "scores"}),
    },
    "segmentation": {
        "serving_default": (FILES, MAPS),
        "strict": (FILES, MAPS),
        "images": (PIXELS, {"label_map", "valid"}),
        "images_uint8": (PIXELS, {"label_map", "valid"}),
        "logits": (PIXELS, {"logits", "valid"}),
    },
}
HUGE_BYTES = 300_000_000  # that a refused image may take at most


@dataclasses.dataclass(frozen=True)
class Check:
    """One promise: what was checked, whether it holds, and the figure."""

    name: str
    ok: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A version directory, what it says of itself, and the session that has it."""

    directory: Path
    manifest: dict
    runtime: Runtime

    @property
    def is_dense(self) -> bool:
        """Whether it answers with label maps."""
        answers = self.runtime.signatures.get("serving_default", {"outputs": {}})
        return "label_map_bytes" in answers["outputs"]

    def check(self, name: str, promise: Callable[[], tuple[bool, str]]) -> Check:
        """Whether a promise holds; a status or a crash says that it does not."""
        try:
            if not self.runtime.is_alive:  # of what was asked before
                self.runtime.restart()
            holds, detail = promise()
            return Check(name, bool(holds), detail)
        except (StatusError, RuntimeCrashError) as error:
            return Check(name, False, str(error))
        except (ValueError, TypeError, LookupError) as error:  # of a damaged manifest
            detail = f"cannot be checked: {type(error).__name__} {error}"
            return Check(name, False, detail)


def manifest_of(directory: Path) -> tuple[dict, Check]:
    """What the artifact says of itself; empty where it cannot be read."""
    path = directory / "assets.extra" / "manifest.json"
    try:
        return json.loads(path.read_text()), Check("manifest", True, "readable")
    except (OSError, ValueError) as error:
        return {}, Check("manifest", False, f"{path}: {error}")


# --- files ---


def of_files(directory: Path) -> Check:
    """Every file is there, whole, and no other is."""
    try:
        found = checksums.flaws(directory)
    except (OSError, ValueError) as error:
        return Check("checksums", False, f"{checksums.NAME}: {error}")
    detail = "; ".join(f"{how}: {', '.join(x)}" for how, x in found.items() if x)
    return Check("checksums", not detail, detail or "every file is whole")


# --- the graph ---


def of_graph(artifact: Artifact) -> Iterator[Check]:
    """What can be told without a request."""
    yield artifact.check("signatures", functools.partial(_signatures, artifact))
    bad = [op for op in artifact.runtime.ops if op.startswith(FORBIDDEN)]
    found = f"{len(artifact.runtime.ops)} ops"
    detail = f"not on a stock server: {', '.join(bad)}" if bad else found
    yield Check("ops", not bad, detail)
    yield artifact.check("weights stored once", functools.partial(_weights, artifact))


def _signatures(artifact):
    signatures = artifact.runtime.signatures
    task = "segmentation" if artifact.is_dense else "classification"
    for signature, (inputs, outputs) in CONTRACTS[task].items():
        found = signatures.get(signature)
        if found is None:
            return False, f"{signature} is missing"
        names = set(found["inputs"]), set(found["outputs"])
        if names != (inputs, outputs):
            return False, f"{signature} has {names}"
    for signature, found in signatures.items():
        for key, x in {**found["inputs"], **found["outputs"]}.items():
            if x["dtype"] not in JSON_DTYPES:
                return False, f"{signature} {key} is {x['dtype']}, not JSON"
            if not x["shape"] or x["shape"][0] != -1:
                return False, f"{signature} {key} has a fixed batch"
    told = artifact.manifest["signatures"]
    if told != (found := described(signatures)):
        return False, f"not those of the manifest: {found}"
    return True, ", ".join(signatures)


def described(signatures: dict) -> dict:
    """Signatures without the names of tensors."""
    return {
        signature: {
            side: {
                key: {"dtype": x["dtype"], "shape": x["shape"]}
                for key, x in found[side].items()
            }
            for side in ("inputs", "outputs")
        }
        for signature, found in signatures.items()
    }


def _weights(artifact):
    files = list((artifact.directory / "variables").glob("*"))
    room = 100_000  # names and checksums
    if artifact.manifest["weights"] == "constants":
        files.append(artifact.directory / "saved_model.pb")
        room = 5_000_000  # the rest of the graph
    stored = sum(path.stat().st_size for path in files)
    told = artifact.manifest["weight_bytes"]
    where = artifact.manifest["weights"]
    detail = f"{stored:,} bytes, {stored / told:.2f} x the weights, as {where}"
    return stored <= 1.02 * told + room, detail


# --- answers ---


def of_answers(artifact: Artifact) -> Iterator[Check]:
    """What only requests show."""
    check = artifact.check
    trained_with = artifact.manifest.get("trained_with", "the trained model")
    yield check(f"logits of {trained_with}", functools.partial(_logits, artifact))
    yield check("answer for a file", functools.partial(_file, artifact))
    for signature in artifact.runtime.signatures:
        promise = functools.partial(_rows_apart, artifact, signature)
        yield check(f"{signature}: each row by itself", promise)
    if "serving_default" in artifact.runtime.signatures:
        yield check("a bad file costs its row", functools.partial(_isolated, artifact))
        yield check("a bad file is told", functools.partial(_strict, artifact))
        yield check("a huge image", functools.partial(_bounded, artifact))


def _logits(artifact):
    reference = artifact.manifest["reference"]
    images = reference_images(reference["seed"], reference["shape"]).astype("float32")
    signature = "logits" if artifact.is_dense else "images"
    logits = artifact.runtime.run(signature, images=images)["logits"]
    expected = np.asarray(reference["logits"])
    bound = artifact.manifest["tolerance"] * max(1.0, np.abs(expected).max())
    return _close(sampled(logits, reference), expected, bound)


def _file(artifact):
    file = artifact.manifest["reference_file"]
    data = strings([base64.b64decode(file["png"])])
    found = artifact.runtime.run("serving_default", image_bytes=data)
    if "label_map_bytes" in file:
        expected = base64.b64decode(file["label_map_bytes"])
        return _same_map(bytes(found["label_map_bytes"][0]), expected)
    expected = np.asarray([file["probabilities"]])
    return _close(found["probabilities"], expected, artifact.manifest["tolerance"])


def _close(found, expected, bound):
    difference = np.abs(found - expected).max(initial=0.0)
    detail = f"difference {difference:.2g}, bound {bound:.2g}"
    return bool(difference <= bound), detail


def _same_map(found, expected):
    from PIL import Image

    limit = 0.001  # where two classes are all but equal
    found, expected = (np.asarray(Image.open(io.BytesIO(x))) for x in (found, expected))
    if expected.shape != found.shape:
        return False, f"size {found.shape}, must be {expected.shape}"
    differing = float((expected != found).mean())
    detail = f"{differing:.2%} of the pixels differ, bound {limit:.1%}"
    return differing <= limit, detail


def _rows_apart(artifact, signature):
    """f(a and b) = f(a) and f(b): what merging requests in a batch relies on."""
    description = artifact.runtime.signatures[signature]["inputs"]
    inputs = sample(description, 3)
    parts = [{key: x[rows] for key, x in inputs.items()} for rows in (ONE, REST)]
    whole, *apart = (artifact.runtime.run(signature, **x) for x in (inputs, *parts))
    # Kernels sum in an order that depends on the batch: 6e-7 in a ViT-B of float32.
    bound = artifact.manifest["tolerance"] / 2
    worst = 0.0
    for key, x in whole.items():
        y = np.concatenate([answer[key] for answer in apart])
        if x.shape != y.shape or len(x) != 3:
            return False, f"{key}: {len(x)} rows for 3, {len(y)} for 1 and 2"
        if x.dtype != "float32":
            continue
        worst = max(worst, np.abs(x - y).max() / max(1.0, np.abs(y).max()))
    return worst <= bound, f"difference {worst:.2g}, bound {bound:.2g}"


ONE, REST = slice(0, 1), slice(1, None)


def _isolated(artifact):
    files, whole = mixed_files()
    run = functools.partial(artifact.runtime.run, "serving_default")
    found, alone = run(image_bytes=files), run(image_bytes=files[:1])
    if found["valid"].tolist() != whole:
        return False, f"valid {found['valid'].tolist()}, must be {whole}"
    key = "label_map_bytes" if artifact.is_dense else "probabilities"
    if artifact.is_dense:
        return _same_map(bytes(found[key][-1]), bytes(alone[key][0]))
    rows = found[key][[0, -1]]
    return _close(rows, alone[key], artifact.manifest["tolerance"] / 2)


def _strict(artifact):
    files, _ = mixed_files()
    try:
        artifact.runtime.run("strict", image_bytes=files)
    except StatusError as error:
        return error.code == "INVALID_ARGUMENT", error.code
    return False, "strict answered a batch with bad files"


def _bounded(artifact):
    if artifact.manifest["max_pixels"] >= SIDE**2:
        return True, f"{SIDE} x {SIDE} pixels are allowed"
    before, start = artifact.runtime.peak_bytes(), time.monotonic()
    files = strings([huge_png()])
    found = artifact.runtime.run("serving_default", image_bytes=files)
    seconds = time.monotonic() - start
    more = artifact.runtime.peak_bytes() - before
    detail = f"refused in {seconds:.2f} s, {more / 1e6:.0f} MB more"
    return not found["valid"].any() and more < HUGE_BYTES, detail


def reference_images(seed: int, shape: Sequence[int]) -> np.ndarray:
    """The images that parity is measured on: uint8 noise of a seed."""
    return np.random.default_rng(seed).integers(0, 256, shape, "uint8")


def sampled(logits: np.ndarray, reference: dict) -> np.ndarray:
    """The logits that the manifest keeps: all of a classifier, some pixels of a map."""
    step = reference["step"]
    return logits[:, ::step, ::step] if logits.ndim == 4 else logits


def malformed(artifact: Artifact, signature: str) -> Check:
    """Each malformed request is refused, or answered where that is right."""
    runtime, flaws, number = artifact.runtime, [], 0
    for name, inputs, acceptable in hostile(runtime.signatures[signature]["inputs"]):
        number += 1
        if flaw := _flaw(runtime, signature, inputs, acceptable):
            flaws.append(f"{name}: {flaw}")
        if not runtime.is_alive:
            runtime.restart()
    detail = "; ".join(flaws) or f"{number}, each refused or answered rightly"
    return Check(f"{signature}: hostile requests", not flaws, detail)


def _flaw(runtime, signature, inputs, acceptable):
    try:
        outputs = runtime.run(signature, **inputs)
    except StatusError as error:
        return "" if error.code == "INVALID_ARGUMENT" else str(error)
    except RuntimeCrashError as error:
        return str(error)
    rows = next(iter(inputs.values())).shape[:1]
    right = all(x.shape[:1] == rows for x in outputs.values())
    right = right and not any(outputs.get("valid", np.zeros(0)))
    return "" if acceptable and right else "answered with nonsense"
