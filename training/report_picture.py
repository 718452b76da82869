"""Pictures of a report: which classes are confused, and how sure the model is."""

from pathlib import Path

import numpy as np

from training.curves import COLOURS, new_axes, save
from training.report import BINS, Report

CELLS = 30  # classes: of more the most frequent confusions are shown
NUMBERS = 15  # classes: of more the cells have no numbers
PAIRS = 25


def draw_confusion(report: Report, path: str | Path) -> None:
    """Write a picture: the confusion matrix, of many classes the worst confusions.

    Args:
        report: What is drawn.
        path: PNG file.
    """
    if len(report.labels) <= CELLS:
        _draw_matrix(report, path)
    else:
        _draw_pairs(report, path)


def _draw_matrix(report, path):
    matrix = report.matrix()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(report.labels)
    side = max(3.5, 0.9 + count * (0.5 if count <= NUMBERS else 0.27))
    figure, (axes,) = new_axes(size=(side + 1, side))
    axes.grid(False)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_short(label) for label in report.labels]
    axes.set_xticks(range(count), names, rotation=90 if _wide(names) else 0)
    axes.set_yticks(range(count), names)
    axes.set(xlabel="answered", ylabel="true class")
    if count <= NUMBERS:
        for (i, j), number in np.ndenumerate(matrix):
            if number:
                colour = "white" if shares[i, j] > 0.6 else "#1b1b1f"
                text = _number(number)
                axes.text(j, i, text, ha="center", va="center", color=colour, size=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"share of the true class's {_unit(report)}")
    save(figure, path)


def _draw_pairs(report, path):
    pairs = report.confusions()[:PAIRS]
    truth = report.counts()[0]
    figure, (axes,) = new_axes(size=(8, 1.4 + 0.25 * max(len(pairs), 4)))
    counts = [count for _, _, count in pairs]
    places = range(len(pairs))
    axes.barh(places, counts, color=COLOURS[0])
    names = [
        f"{_short(report.labels[i])} → {_short(report.labels[j])}" for i, j, _ in pairs
    ]
    axes.set_yticks(places, names, fontsize=8)
    axes.set_ylim(max(len(pairs), 4) - 0.4, -0.6)
    for place, (i, _, count) in zip(places, pairs, strict=True):
        text = f" {_number(count)} ({count / truth[i]:.0%})"
        axes.text(count, place, text, va="center", fontsize=8)
    axes.set_xlim(0, 1.15 * max(counts, default=1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(f"{_unit(report)} (share of the true class)")
    title = f"true class → answer: the {len(pairs)} most frequent confusions"
    axes.set_title(title if pairs else "no confusions", fontsize=10)
    save(figure, path)


def draw_calibration(report: Report, path: str | Path) -> None:
    """Write a picture: the accuracy of answers by how sure the model was of them.

    Args:
        report: What is drawn.
        path: PNG file.
    """
    figure, (axes,) = new_axes(size=(4.8, 4.8))
    axes.plot([0, 1], [0, 1], "--", color="#808080", label="calibrated")
    rows = report.calibration()
    middles = [(row["above"] + row["to"]) / 2 for row in rows]
    heights = [row["accuracy"] for row in rows]
    axes.bar(middles, heights, 0.9 / BINS, color=COLOURS[5], label="accuracy")
    sure = [row["confidence"] for row in rows]
    axes.plot(sure, heights, "o", color=COLOURS[0], markersize=4, label="mean of a bin")
    shares = [row["answers"] / report.answers for row in rows]
    axes.step(
        np.arange(BINS + 1) / BINS,
        _spread(rows, shares),
        where="post",
        color=COLOURS[1],
        label=f"share of the {_unit(report)}",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    error = report.figures()["calibration_error"]
    axes.set_title(f"expected calibration error {error:.4f}", fontsize=10)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    save(figure, path)


def _spread(rows, shares):
    """The shares of all bins, also the empty ones, and the last once more."""
    values = np.zeros(BINS + 1)
    for row, share in zip(rows, shares, strict=True):
        values[round(row["above"] * BINS)] = share
    values[-1] = values[-2]
    return values


def _unit(report):
    return "pixels" if report.pixels else "images"


def _number(count):
    return f"{count}" if count < 10_000 else f"{count / 1000:,.0f}k"


def _short(label):
    return label if len(label) <= 24 else f"{label[:23]}…"


def _wide(names):
    return max(map(len, names)) > 3
