"""What an artifact that computes in less than float32 costs, measured on itself."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np

from export.runtime import Runtime

PRECISIONS = ("float32", "bfloat16")
TOLERANCES = {  # of max(1, max |logit|)
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}
BATCH = 8
SYNTHETIC = 32  # images, where none are given


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images with the answers of the trained model.

    Args:
        images: Raw pixels of 0..255, `(N, H, W, 3)`.
        labels: Class of each, or of each pixel, `(N, ...)`, -1 for one that does not
            count; None where nobody knows.
        logits: float32 `(N, ..., C)`, of the model that is exported.
    """

    images: np.ndarray
    labels: np.ndarray | None
    logits: np.ndarray


def check_precision(precision: str | None) -> None:
    """Refuse what no artifact computes in.

    Raises:
        ValueError: If it is neither None nor one of `PRECISIONS`.
    """
    if precision in (None, *PRECISIONS):
        return
    reason = ""
    if precision == "int8":
        reason = (
            " TensorFlow's int8 kernels were slower than its bfloat16 ones in a vision "
            "transformer (benchmarks/README.md)."
        )
    known = ", ".join(map(repr, PRECISIONS))
    raise ValueError(
        f"precision must be {known} or None, the model's own; got {precision!r}."
        f"{reason}"
    )


def computes_in(model: keras.Model) -> str:
    """The lowest precision of a model's layers: float16, bfloat16 or float32."""
    dtypes = {layer.compute_dtype for layer in model.layers}
    return next((x for x in ("float16", "bfloat16") if x in dtypes), "float32")


def synthetic(height: int, width: int) -> np.ndarray:
    """Random images, `(N, H, W, 3)`: noise, from coarse to fine, of random contrast."""
    generator = np.random.default_rng(0)
    images = []
    for i in range(SYNTHETIC):
        side = 2 ** (i % 6)
        coarse = generator.uniform(size=(-(-height // side), -(-width // side), 3))
        fine = coarse.repeat(side, 0).repeat(side, 1)[:height, :width]
        images.append(255 * fine ** generator.uniform(0.3, 3))
    return np.stack(images).astype("uint8")


def compare(directory: Path, samples: Samples) -> dict:
    """Figures of an artifact beside the model that it was made of.

    Returns:
        `images`; `same_best_class`, in how many answers, of images or pixels, the best
        class is that of the model, as a fraction; `largest_difference` of logits and
        `mean_difference`, relative to the largest |logit|; where there are labels
        `accuracy_of_model` and `accuracy`.
    """
    found = []
    with Runtime(directory) as runtime:
        name = "logits" if "logits" in runtime.signatures else "images"
        for i in range(0, len(samples.images), BATCH):
            images = samples.images[i : i + BATCH].astype("float32")
            found.append(runtime.run(name, images=images)["logits"])
    logits = np.concatenate(found)
    difference = np.abs(logits - samples.logits) / np.abs(samples.logits).max()
    best, best_of_model = logits.argmax(-1), samples.logits.argmax(-1)
    figures = {
        "images": len(logits),
        "same_best_class": float((best == best_of_model).mean()),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }
    if samples.labels is not None:
        known = samples.labels >= 0
        right = best_of_model == samples.labels, best == samples.labels
        names = "accuracy_of_model", "accuracy"
        figures |= {
            k: float(x[known].mean()) for k, x in zip(names, right, strict=True)
        }
    return figures


def precision_cost(directory: Path) -> str | None:
    """What the report of a version says of its precision, in words; None if nothing."""
    report = json.loads((directory / "assets.extra" / "report.json").read_text())
    figures = report.get("precision")
    return None if figures is None else _in_words(figures)


def _in_words(figures):
    told = (
        f"{figures['images']} images: best class as that of the model in "
        f"{figures['same_best_class']:.2%}, logits within "
        f"{figures['largest_difference']:.2g} of the largest"
    )
    if "accuracy" in figures:
        told += (
            f", accuracy {figures['accuracy']:.2%}, of the model "
            f"{figures['accuracy_of_model']:.2%}"
        )
    return told
