"""Pictures of curves over epochs: of one run, or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from training.history import read_history, score_name

COLOURS = (  # Okabe's and Ito's, those that differ on white
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1b1f"),
)
WORDS = {"mean_iou": "mean IoU"}


def new_axes(count: int = 1, size: tuple[float, float] = (7, 3.2)) -> tuple:
    """A figure without a window, and its axes, in a row, with a grid behind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    row = figure.subplots(1, count, squeeze=False)[0]
    for axes in row:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, row


def save(figure, path: str | Path) -> None:
    """Write a figure to a PNG file, and the folder where it goes if there is none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def draw_run(run_dir: str | Path) -> None:
    """Write `curves.png` in a run directory, of its `history.csv`.

    Loss, score and learning rate over the epochs; of loss and score those of training
    images and of held-out images.

    Raises:
        ValueError: If the history is damaged.
    """
    rows = read_history(run_dir)
    score = score_name(rows)
    if not rows:
        return
    name = None if score is None else score.removeprefix("val_")
    panels = [panel for panel in ("loss", name, "learning_rate") if panel is not None]
    panels = [x for x in panels if any(x in row or f"val_{x}" in row for row in rows)]
    figure, grid = new_axes(len(panels), (4.2 * len(panels), 3.4))
    for axes, panel in zip(grid, panels, strict=True):
        lines = {"held out": f"val_{panel}", "training": panel}
        for i, (label, key) in enumerate(lines.items()):
            _line(axes, rows, key, label, COLOURS[1 - i])
        _finish(axes, panel, len(axes.lines) > 1)
        _fit(axes, rows)
    if score is not None:
        best = max(rows, key=lambda row: row.get(score, float("-inf")))
        text = (
            f"best {WORDS.get(name, name)} {best[score]:.4g}, epoch {best['epoch']:g}"
        )
        if best is not rows[-1] and score in rows[-1]:  # last.keras is what is exported
            text += f"; last {rows[-1][score]:.4g}"
        grid[panels.index(name)].set_title(text, fontsize=10)
    save(figure, Path(run_dir) / "curves.png")


def draw_comparison(
    runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path
) -> None:
    """Write a picture: the curves of held-out images of several runs.

    Args:
        runs: The rows of the history of each by its name.
        path: PNG file.

    Raises:
        ValueError: If no epoch of any is done.
    """
    rows = [row for history in runs.values() for row in history]
    scores = [score_name(history) for history in runs.values() if history]
    if not rows:
        raise ValueError("No epoch of these runs is done: there are no curves yet.")
    panels = [x for x in ("val_loss", *dict.fromkeys(filter(None, scores)))]
    figure, grid = new_axes(len(panels), (5 * len(panels), 3.8))
    for axes, panel in zip(grid, panels, strict=True):
        for i, (name, history) in enumerate(runs.items()):
            _line(axes, history, panel, name, COLOURS[i % len(COLOURS)])
        _finish(axes, panel, legend=False)
        _fit(axes, rows)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )
    save(figure, path)


def _line(axes, rows, key, label, colour):
    """A line of the epochs that tell `key`; a point where there is but one."""
    points = [(row["epoch"], row[key]) for row in rows if key in row]
    if points:
        few = {"marker": "o", "markersize": 4} if len(points) < 15 else {}
        axes.plot(*zip(*points, strict=True), label=label, color=colour, **few)


def _finish(axes, name, legend):
    held_out = "held-out " if name.startswith("val_") else ""
    name = name.removeprefix("val_")
    label = held_out + WORDS.get(name, name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if name == "learning_rate":
        axes.set_ylim(bottom=0)
    if legend:
        axes.legend(frameon=False, fontsize=9)


def _fit(axes, rows):
    """Show all epochs that were done, the only one of a short run in the middle."""
    epochs = [row["epoch"] for row in rows]
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
