"""What an artifact that computes in less than float32 costs, measured on itself."""

import collections
import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from export.runtime import Runtime
from keras_vit.embedding import Preprocess

PRECISIONS = ("float32", "bfloat16")
TOLERANCES = {  # of max(1, max |logit|)
    "float32": 1e-5,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}
BATCH = 8
SYNTHETIC = 32  # images, where none are given

Samples = tuple[np.ndarray, np.ndarray | None]  # raw pixels and, if known, labels


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
            " No int8 is made, benchmarks/README.md says why; bfloat16 is what is "
            "nearest."
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


def check_samples(samples, model: keras.Model) -> Samples:
    """Images and labels that a precision is judged on; noise where none are given.

    Raises:
        ValueError: If they are no images of the model's size, or labels of another
            number or shape than its answers.
    """
    images, labels = samples if isinstance(samples, tuple | list) else (samples, None)
    if images is None:
        images = synthetic(*Preprocess.of_model(model).image_size)
    shape, taken = np.shape(images), model.input_shape
    sizes = zip(shape[1:], taken[1:], strict=False)
    if len(shape) != 4 or not shape[0] or any(b not in (None, a) for a, b in sizes):
        raise ValueError(
            f"samples must be raw pixels (N, H, W, C) for a model of {taken}, or a "
            f"pair of them and their labels, got an array of shape {shape}."
        )
    answers = (shape[0], *shape[1:3]) if len(model.output_shape) == 4 else shape[:1]
    if labels is not None and np.shape(labels) != answers:
        raise ValueError(
            f"The labels of samples must have the shape {answers}, got "
            f"{np.shape(labels)}."
        )
    return images, None if labels is None else np.asarray(labels)


def compare(
    directory: Path,
    images: np.ndarray,
    labels: np.ndarray | None,
    answer: Callable[[np.ndarray], np.ndarray],
) -> dict:
    """Figures of an artifact beside the model that it was made of, batch by batch.

    Args:
        directory: The version directory.
        images: Raw pixels `(N, H, W, 3)`.
        labels: Class of each, or of each pixel, `(N, ...)`, -1 for one that does not
            count; None where nobody knows.
        answer: The model: float32 images `(B, H, W, 3)` to logits.

    Returns:
        `images`; `same_best_class`, in which part of the answers, of images or pixels,
        the best class is that of the model; `largest_difference` and
        `mean_difference` of logits, relative to max(1, max |logit|); where labels count
        `accuracy_of_model` and `accuracy`.
    """
    sums = collections.Counter()
    largest = peak = 0.0
    with Runtime(directory) as runtime:
        name = "logits" if "logits" in runtime.signatures else "images"
        for i in range(0, len(images), BATCH):
            batch = np.asarray(images[i : i + BATCH], "float32")
            expected = answer(batch)
            logits = runtime.run(name, images=batch)["logits"]
            difference = np.abs(logits - expected)
            largest = max(largest, float(difference.max()))
            peak = max(peak, float(np.abs(expected).max()))
            best, best_of_model = logits.argmax(-1), expected.argmax(-1)
            sums["logits"] += logits.size
            sums["difference"] += float(difference.sum(dtype="float64"))
            sums["answers"] += best.size
            sums["same"] += int((best == best_of_model).sum())
            if labels is not None:
                truth = labels[i : i + BATCH]
                sums["labels"] += int((truth >= 0).sum())
                sums["right"] += int((best == truth).sum())
                sums["right_of_model"] += int((best_of_model == truth).sum())
    scale = max(1.0, peak)
    figures = {
        "images": len(images),
        "same_best_class": sums["same"] / sums["answers"],
        "largest_difference": largest / scale,
        "mean_difference": sums["difference"] / sums["logits"] / scale,
    }
    if sums["labels"]:
        figures["accuracy_of_model"] = sums["right_of_model"] / sums["labels"]
        figures["accuracy"] = sums["right"] / sums["labels"]
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
        f"{figures['largest_difference']:.2g} of max(1, the largest)"
    )
    if "accuracy" in figures:
        told += (
            f", accuracy {figures['accuracy']:.2%}, of the model "
            f"{figures['accuracy_of_model']:.2%}"
        )
    return told
