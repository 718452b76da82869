"""How good a model is on the held-out part of a dataset."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
from tqdm.auto import tqdm

from keras_vit.model_file import read_model
from training.batches import validation_batches
from training.damage import HeldOutDamage, naming_what_stops
from training.data import Dataset, load_data
from training.report import Judge, Report
from training.task import IGNORED, check_fits, is_segmentation, preprocess_for


def evaluate(
    model: keras.Model,
    data: Dataset,
    batch_size: int = 64,
    image_size: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Loss and scores over all held-out images; damaged ones are named and left out.

    Args:
        model: With logits `(B, C)`, or `(B, H, W, C)` for data with masks.
        data: What `load_data` returns.
        batch_size: Images a step.
        image_size: `(H, W)` to which files are resized; None for the model's own, or
            where it takes any size for that of the data.

    Returns:
        `loss`, `accuracy` and `calibration_error`; with more than 5 classes
        `top5_accuracy`; for data with masks `mean_iou`, and all of them over the pixels
        that count. See `training.report.Report.figures`.

    Raises:
        ValueError: If the model and the data do not fit, the model does not take
            images of that size, or every held-out image is damaged.
    """
    return examine(model, data, batch_size, image_size).figures()


def examine(
    model: keras.Model,
    data: Dataset,
    batch_size: int = 64,
    image_size: tuple[int, int] | None = None,
) -> Report:
    """What `evaluate` tells, and classes, confusions, calibration; in one pass.

    Args:
        model: As that of `evaluate`, and so are the others.

    Raises:
        ValueError: Those of `evaluate`.
    """
    check_fits(model, data)
    preprocess = preprocess_for(model, data, image_size)
    damage = HeldOutDamage(data)
    report = Report(tuple(data.labels), is_segmentation(model))
    judge = _judged(model)
    batches = validation_batches(data, preprocess, batch_size, damaged=damage.tell)
    total = data.sizes["validation"]
    bar = tqdm(total=total, unit=" images", desc="evaluate", dynamic_ncols=True)
    with naming_what_stops(data), bar:
        for images, labels in batches.as_numpy_iterator():
            found = judge.predict_on_batch([images, labels])
            counts = labels != IGNORED if data.masks else ...
            found = {name: x[counts].ravel() for name, x in found.items()}
            report.add(labels[counts].ravel(), **found)
            report.images += len(images)
            bar.update(len(images))
    damage.settle()
    return report


def held_out(
    model: Path, data: str | None = None, count: int = 512
) -> tuple[np.ndarray, np.ndarray] | None:
    """Held-out images of a dataset, as a model sees them, and their labels.

    Args:
        model: A `.keras` file; that of a run knows its data.
        data: As that of `load_data`; None for the data of the run.
        count: About how many, evenly spaced; of fewer all.

    Returns:
        Raw pixels float32 `(N, H, W, 3)` and labels `(N, ...)`, -1 in pixels that do
        not count; None for a file of no run without `data`.

    Raises:
        ValueError: If the data do not fit the model or cannot be read.
    """
    run = model.parent / "run.json"
    if data is None:
        if not run.is_file():
            return None
        data = json.loads(run.read_text())["data"]["name"]
    network, images = read_model(model), load_data(data)
    check_fits(network, images)
    step = max(1, images.sizes["validation"] // count)

    def spaced(part):
        numbered = images.stream(part).enumerate()
        return numbered.filter(lambda i, _: i % step == 0).map(lambda _, x: x)

    kept = {"validation": -(-images.sizes["validation"] // step)}
    few = dataclasses.replace(images, stream=spaced, sizes=images.sizes | kept)
    damage = HeldOutDamage(few)
    preprocess = preprocess_for(network, images)
    batches = validation_batches(few, preprocess, 64, damaged=damage.tell)
    found = zip(*batches.as_numpy_iterator(), strict=True)
    pixels, labels = (np.concatenate(x) for x in found)
    labels = labels.astype("int64")
    return pixels, np.where(labels == IGNORED, -1, labels) if images.masks else labels


def _judged(model):
    """A model of (images, labels) that answers what is counted of the logits."""
    logits = model.outputs[0]
    labels = keras.Input(logits.shape[1:-1], dtype="int32", name="labels")
    judge = Judge(dtype="float32", name="judge")
    return keras.Model([model.inputs[0], labels], judge([logits, labels]))


def in_words(result: dict[str, float]) -> str:
    """Accuracy, or mean IoU and accuracy of pixels, of what `evaluate` returns."""
    accuracy = f"accuracy {result['accuracy']:.2%}"
    if "mean_iou" in result:
        return f"mean IoU {result['mean_iou']:.4f}, pixel {accuracy}"
    best = next((key for key in result if key.startswith("top")), None)
    if best is None:
        return accuracy
    k = best.removeprefix("top").removesuffix("_accuracy")
    return f"{accuracy}, top-{k} {result[best]:.2%}"
