"""From the rows of runs to means, intervals, tables and pictures."""

from collections.abc import Iterable
from pathlib import Path

import scipy.stats

PERCENT = 100.0


def arms_in(rows: list[dict], arms: Iterable[str]) -> list[str]:
    """Those arms that have rows, in this order: `--quick` runs some of them."""
    found = {row["arm"] for row in rows}
    return [arm for arm in arms if arm in found]


def by_seed(rows: list[dict], column: str, **where) -> dict[int, float]:
    """One column of the rows that are as `where` says: a value for each seed."""
    return _by("seed", rows, column, where)


def by_round(rows: list[dict], column: str, **where) -> dict[int, float]:
    """The same for each round of a measurement."""
    return _by("round", rows, column, where)


def _by(key, rows, column, where):
    return {
        row[key]: row[column]
        for row in rows
        if all(row[name] == value for name, value in where.items())
    }


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of it by Student's t; nan for one value."""
    values = list(values)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    return mean, quantile * scipy.stats.sem(values)


def paired(first: dict[int, float], second: dict[int, float]) -> list[float]:
    """First minus second, seed by seed."""
    return [first[seed] - second[seed] for seed in first if seed in second]


def by_images(rows: list[dict], arm: str, counts: Iterable[int]) -> list[dict]:
    """Accuracy of an arm by seed, for each number of training images."""
    return [by_seed(rows, "accuracy", arm=arm, images=count) for count in counts]


def gains(first: list[dict], second: list[dict]) -> list[str]:
    """Points that the first are ahead, paired by seed, for each number of images."""
    return [points(paired(*x)) for x in zip(first, second, strict=True)]


def percent(values: Iterable[float]) -> str:
    """Mean and half interval of parts, in percent: `93.1 ± 0.4`."""
    mean, half = interval(values)
    return f"{mean * PERCENT:.1f}{_half(half * PERCENT)}"


def points(values: Iterable[float]) -> str:
    """The same of differences, with their sign: `+1.2 ± 0.4`."""
    mean, half = interval(values)
    return f"{mean * PERCENT:+.1f}{_half(half * PERCENT)}"


def markdown(heads: list[str], lines: list[list]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def compared(
    rows: list[dict], record: list[dict], names: tuple[str, ...], column: str
) -> str:
    """Say which means are outside the 95 % intervals of the record.

    Args:
        rows: What was found.
        record: What is committed.
        names: Columns that tell a mean from others.
        column: What is averaged.
    """

    def grouped(rows):
        groups = {}
        for row in rows:
            key = ", ".join(str(row[name]) for name in names)
            groups.setdefault(key, []).append(row[column])
        return groups

    known, outside, count = grouped(record), [], 0
    for key, values in grouped(rows).items():
        if key in known and len(known[key]) > 1:
            mean, half = interval(known[key])
            found = interval(values)[0]
            count += 1
            if abs(found - mean) > half + 1e-3:  # equal seeds have no interval
                outside.append(f"  {key}: {found:.4f}, record {mean:.4f} ± {half:.4f}")
    if not count:
        return "There is no record to compare this with."
    head = f"{count - len(outside)} of {count} means lie within the record's intervals"
    return "\n".join([head + (":" if outside else "."), *outside])


def lines_picture(
    path: Path,
    panels: dict[str, dict[str, dict[float, list[float]]]],
    x_label: str,
    y_label: str,
    title: str,
) -> None:
    """Draw a panel of lines with their intervals for each name.

    Args:
        path: A PNG file.
        panels: Title of a panel, name of a line, place on the x axis, values of the
            seeds there, parts of 1.
        x_label: Of the x axis.
        y_label: Of the y axis.
        title: Above all.
    """
    figure, all_axes = _figure(len(panels))
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for i, (label, values) in enumerate(lines.items()):
            means = [interval(x) for x in values.values()]
            axes.errorbar(
                list(values),
                [mean * PERCENT for mean, _ in means],
                [half * PERCENT for _, half in means],
                label=label,
                color=f"C{i % 10}",
                linestyle="-" if i < 10 else "--",
                marker="os^vD"[i % 5],
                markersize=4,
                capsize=2,
                linewidth=1.2,
            )
        axes.set(title=name, xlabel=x_label)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(y_label)
    all_axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, title, path)


def images_picture(
    path: Path, rows: list[dict], arms: list[str], counts: tuple[int, ...], title: str
) -> None:
    """Draw the accuracy of arms by their number of training images."""
    lines = {
        arm: {
            count: list(found.values())
            for count, found in zip(counts, by_images(rows, arm, counts), strict=True)
        }
        for arm in arms
    }
    lines_picture(path, {"": lines}, "training images", "accuracy, %", title)


def dots_picture(
    path: Path,
    panels: dict[str, dict[str, list[float]]],
    x_label: str,
    title: str,
) -> None:
    """Draw a panel of means with their intervals, and every seed as a small dot.

    Args:
        path: A PNG file.
        panels: Title of a panel, name of a line of it, values of the seeds, parts of
            1; all with the same names.
        x_label: Of the x axis.
        title: Above all.
    """
    figure, all_axes = _figure(len(panels))
    for axes, (name, lines) in zip(all_axes, panels.items(), strict=True):
        for i, values in enumerate(lines.values()):
            mean, half = (x * PERCENT for x in interval(values))
            seeds = [x * PERCENT for x in values]
            axes.plot(seeds, [i + 0.2] * len(seeds), ".", color="0.6", markersize=5)
            axes.errorbar(mean, i, xerr=half, fmt="o", color=f"C{i % 10}", capsize=4)
        axes.set(title=name, xlabel=x_label)
        axes.set_yticks(range(len(lines)), list(lines))
        axes.grid(alpha=0.3)
        axes.invert_yaxis()
        axes.set_xlim(right=min(axes.get_xlim()[1], PERCENT + 3))  # not of intervals
    for axes in all_axes[1:]:
        axes.set_yticklabels([])
    _save(figure, title, path)


def _figure(count):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(4.6 * count + 1.6, 4.4), squeeze=False, layout="constrained"
    )
    return figure, list(axes[0])


def _save(figure, title, path):
    import matplotlib.pyplot as plt

    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _half(half):
    return "" if half != half else f" ± {half:.1f}"  # nan: one seed has no interval
