"""What a model answered to held-out images, counted: classes, confusions, calibration.

An answer is that to an image, or to a pixel that counts. C classes.
"""

import collections
import csv
import dataclasses
import json
import math
from pathlib import Path

import keras
import numpy as np
from keras import ops

from keras_vit.model_file import replacing
from training.loss import serializable

BINS = 15  # of equal width, as in the paper of the calibration error
CONFUSIONS = 100  # of a report in JSON, the most frequent ones


@serializable
class Judge(keras.layers.Layer):
    """What of each answer is counted, found where the logits are.

    Call arguments:
        inputs: Logits `(..., C)`, and classes `(...)`, of which those out of range
            count nowhere.

    Returns:
        Dictionary of `predicted`, the class of the largest logit; `confidence`, its
        probability; `loss`, the cross-entropy of the true class; and `better`, the
        number of classes with a larger logit than the true one; each `(...)`.
    """

    def call(self, inputs):
        logits, labels = inputs
        logits = ops.cast(logits, "float32")
        labels = ops.clip(labels, 0, logits.shape[-1] - 1)
        of_truth = ops.take_along_axis(logits, labels[..., None], axis=-1)
        sums = ops.logsumexp(logits, axis=-1)
        return {
            "predicted": ops.argmax(logits, axis=-1),
            "confidence": ops.exp(ops.max(logits, axis=-1) - sums),
            "loss": sums - of_truth[..., 0],
            "better": ops.sum(ops.cast(logits > of_truth, "int32"), axis=-1),
        }


@dataclasses.dataclass
class Report:
    """Answers, counted batch by batch; no logits are kept.

    Args:
        labels: Name of each class.
        pixels: Whether the answers are those to pixels.
    """

    labels: tuple[str, ...]
    pixels: bool = False

    def __post_init__(self):
        self.images = 0
        self.answers = 0
        self.loss = 0.0
        self.within = 0  # of the true class among the k best
        self.pairs = collections.Counter()  # true * C + predicted
        self.bins = np.zeros((3, BINS))  # answers, right ones, confidence

    @property
    def k(self) -> int:
        """k of the top-k accuracy; below 2 there is none."""
        return 0 if self.pixels else min(5, len(self.labels) - 1)

    def add(
        self,
        truth: np.ndarray,
        predicted: np.ndarray,
        confidence: np.ndarray,
        loss: np.ndarray,
        better: np.ndarray,
    ) -> None:
        """Count answers: what `Judge` returns, each `(N,)`, and the true classes."""
        truth, predicted = truth.astype("int64"), predicted.astype("int64")
        keys = truth * len(self.labels) + predicted
        keys, counts = np.unique(keys, return_counts=True)
        self.pairs.update(dict(zip(keys.tolist(), counts.tolist(), strict=True)))
        self.answers += len(truth)
        self.loss += float(np.sum(loss, dtype="float64"))
        self.within += int(np.sum(better < self.k))
        place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        for row, weights in enumerate((None, truth == predicted, confidence)):
            self.bins[row] += np.bincount(place, weights, BINS)

    def figures(self) -> dict[str, float]:
        """Loss and scores over all answers.

        Returns:
            `loss`, the mean cross-entropy; `accuracy`; `top5_accuracy` (`top3_accuracy`
            of 4 classes) where images have more than 2 classes; `mean_iou` of pixels,
            the mean over classes of intersection / union, classes that neither truth
            nor answer has left out; and `calibration_error`:

            sum over b of n_b / N * |right_b / n_b - confidence_b / n_b|

            over bins b of equal width of the confidence.

        Source: Guo et al. 2017, "On Calibration of Modern Neural Networks",
        equation 3, https://arxiv.org/abs/1706.04599.
        """
        truth, predicted, right = self.counts()
        total = max(self.answers, 1)
        figures = {"loss": self.loss / total, "accuracy": float(right.sum()) / total}
        if self.k > 1:
            figures[f"top{self.k}_accuracy"] = self.within / total
        if self.pixels:
            union = truth + predicted - right
            there = union > 0
            figures["mean_iou"] = float(np.mean(right[there] / union[there]))
        _, hits, confidence = self.bins
        figures["calibration_error"] = float(np.abs(hits - confidence).sum()) / total
        return figures

    def classes(self) -> list[dict]:
        """A row for each class, in their order; what is 0 / 0 is None.

        Returns:
            `class`; `images` or `pixels` that are of it; `precision`, `recall`, `f1`,
            of pixels `iou`; and the class that it is most often taken for,
            `confused_with`, with the number of times, `confused`.
        """
        of = {}
        for true, predicted, count in self.confusions():
            of.setdefault(true, (self.labels[predicted], count))
        rows = []
        counts = zip(*(x.tolist() for x in self.counts()), strict=True)
        for i, (truth, predicted, right) in enumerate(counts):
            row = {
                "class": self.labels[i],
                "pixels" if self.pixels else "images": truth,
                "precision": _share(right, predicted),
                "recall": _share(right, truth),
                "f1": _share(2 * right, truth + predicted),
            }
            if self.pixels:
                row["iou"] = _share(right, truth + predicted - right)
            row["confused_with"], row["confused"] = of.get(i, (None, 0))
            rows.append(row)
        return rows

    def confusions(self) -> list[tuple[int, int, int]]:
        """(true class, answer, number) of the wrong answers, most frequent first."""
        count = len(self.labels)
        wrong = [(*divmod(key, count), number) for key, number in self.pairs.items()]
        wrong = [x for x in wrong if x[0] != x[1]]
        return sorted(wrong, key=lambda x: (-x[2], x[0], x[1]))

    def matrix(self) -> np.ndarray:
        """Number of answers for each true class and each class answered `(C, C)`."""
        matrix = np.zeros((len(self.labels),) * 2, "int64")
        matrix.flat[list(self.pairs)] = list(self.pairs.values())
        return matrix

    def calibration(self) -> list[dict]:
        """A row for each bin of the confidence that has answers."""
        rows = []
        for i, (count, right, confidence) in enumerate(self.bins.T.tolist()):
            if count:
                limits = {
                    "above": i / BINS,
                    "to": (i + 1) / BINS,
                    "answers": int(count),
                }
                means = {"accuracy": right / count, "confidence": confidence / count}
                rows.append(limits | means)
        return rows

    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each class: answers that are of it, that say it, that are right `(C,)`."""
        count = len(self.labels)
        truth, predicted, right = np.zeros((3, count), "int64")
        for key, number in self.pairs.items():
            i, j = divmod(key, count)
            truth[i] += number
            predicted[j] += number
            right[i] += number if i == j else 0
        return truth, predicted, right


def write_report(report: Report, directory: str | Path, **about: str) -> list[Path]:
    """Write `report.json`, `classes.csv`, `confusion.png` and `calibration.png`.

    Args:
        report: What is written.
        directory: Where to; made if it is not there.
        **about: What else `report.json` says, such as the name of the data.

    Returns:
        The files.
    """
    from training.report_picture import draw_calibration, draw_confusion

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    names = ("report.json", "classes.csv", "confusion.png", "calibration.png")
    paths = [directory / name for name in names]
    names = report.labels
    figures = {
        name: value if math.isfinite(value) else None
        for name, value in report.figures().items()
    }
    content = {
        **about,
        "images": report.images,
        **figures,
        "calibration": report.calibration(),
        "confusions": [
            {"class": names[i], "confused_with": names[j], "times": count}
            for i, j, count in report.confusions()[:CONFUSIONS]
        ],
    }
    rows = report.classes()
    with replacing(paths[0]) as path:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    with replacing(paths[1]) as path, path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    draw_confusion(report, paths[2])
    draw_calibration(report, paths[3])
    return paths


def _share(part, whole):
    return part / whole if whole else None
