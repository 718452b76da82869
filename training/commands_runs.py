"""Commands that look at what was trained: a model on held-out images, and runs.

Whatever takes long to import is imported inside the functions.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from training import options
from training.command import parse_size
from training.commands import check_png, console, say

WORST = 10  # classes that the terminal shows
LIGHT = ("runs",)  # commands that read text files only, without TensorFlow

app = typer.Typer()


@app.command()
def evaluate(
    model: options.RunOrFile,
    data: Annotated[str, typer.Option(help=options.DATA)],
    data_dir: options.DataDir = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    image_size: options.AnySize = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.json, classes.csv, confusion.png, calibration.png."
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG file of images, labels and answers (pixels, tokens)."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label maps for the picture, from `annotate`.")
    ] = None,
) -> None:
    """How good a model is on the held-out part of a dataset, class by class."""
    import training
    from keras_vit.model_file import read_model
    from training.evaluation import in_words
    from training.files import model_file
    from training.report import write_report
    from training.token_picture import check_drawable, draw

    if out is not None and not out.is_dir():
        out.mkdir(parents=True)  # an error comes before the work
    path, _ = model_file(model)
    size = None if image_size is None else parse_size(image_size)
    network = read_model(path)
    images = training.load_data(data, data_dir)
    if labels is not None:
        images = training.with_label_maps(images, labels)
    if picture is not None:
        check_drawable(network, images)
    report = training.examine(network, images, batch_size, size)
    result = report.figures()
    _print_classes(report)
    figures = f"{in_words(result)}, loss {result['loss']:.4f}"
    figures += f", calibration error {result['calibration_error']:.4f}"
    say(f"{report.images} held-out images of {data}: {figures}")
    if out is not None:
        for file in write_report(report, out, model=str(path), data=data):
            say(f"Written: {file}")
    if picture is not None:
        draw(network, images, picture, size)
        say(f"Picture: {picture}")


@app.command()
def look(
    model: options.RunOrFile,
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("look"),
    image_size: options.AnySize = None,
    block: Annotated[
        int | None,
        typer.Option(
            help="Whose attention; 0 is the first block.", show_default="the last"
        ),
    ] = None,
) -> None:
    """Pictures of what a model sees: features, attention, rollout, positions."""
    from keras_vit.model_file import read_model
    from training.files import model_file
    from training.look import read_images, write_pictures

    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder, {out} is a file.")
    out.mkdir(parents=True, exist_ok=True)  # an error comes before the work
    size = None if image_size is None else parse_size(image_size)
    network = read_model(model_file(model)[0])
    pixels = read_images(network, images, size)
    for path in write_pictures(network, pixels, out, block):
        say(f"Picture: {path}")


def _print_classes(report):
    """The classes that the model knows worst."""
    by = "iou" if report.pixels else "recall"
    unit = "pixels" if report.pixels else "images"
    rows = [row for row in report.classes() if row[by] is not None]
    worst = sorted(rows, key=lambda row: row[by])[:WORST]
    table = Table()
    table.add_column("class", overflow="fold")
    columns = [unit, "precision", "recall", "f1", *(["iou"] if report.pixels else [])]
    for name in columns:
        table.add_column({"f1": "F1", "iou": "IoU"}.get(name, name), justify="right")
    table.add_column("most often taken for", overflow="fold")
    for row in worst:
        figures = [_share(row[name], name) for name in columns[1:]]
        other = f"{row['confused_with']} ({row['confused']:,})"
        cells = [row["class"], f"{row[unit]:,}", *figures]
        cells.append(other if row["confused"] else "")
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(rows) > WORST:
        what = "IoU" if report.pixels else "recall"
        say(
            f"The {WORST} of {len(rows)} classes with the lowest {what}; "
            "--out DIR writes all of them to DIR/classes.csv."
        )


def _share(value, name):
    if value is None:
        return "-"
    return f"{value:.3f}" if name == "iou" else f"{value:.1%}"


@app.command()
def runs(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR | RUN RUN",
            help="A folder of runs, or run directories to compare.",
            show_default="runs",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for programs.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG file of the curves of runs compared.")
    ] = None,
) -> None:
    """List the runs in a folder, or say in what some of them differ."""
    directories = directories or [Path("runs")]
    if len(directories) > 1:
        _compare(directories, as_json, picture)
        return
    if picture is not None:
        raise ValueError("--picture compares runs: keras-vit runs RUN RUN --picture X")
    from training.history import find_runs

    found = find_runs(directories[0])
    if as_json:
        print(json.dumps(found, indent=2))
        return
    if not found:
        say(f"There is no run in {directories[0]}, no folder with a run.json.")
        return
    for data in dict.fromkeys(told["data"] for told in found):
        _print_runs(data, [x for x in found if x["data"] == data], directories[0])
    if any(told["state"] == "unfinished" for told in found):
        say("Unfinished: run the same command again to go on.")
    for told in found:
        if told["reason"] is not None:
            say(f"Damaged: {told['run']}: {told['reason']}.")


def _print_runs(data, found, directory):
    """The runs of one dataset, which can be compared."""
    title = Text(f"data: {data or 'not known'}")
    table = Table(title=title, title_justify="left", show_lines=True)
    table.add_column("run", overflow="fold")
    for name in ("epochs", "best", "last loss", "time", "last wrote"):
        table.add_column(name, justify="right", no_wrap=True)
    for told in found:
        path = Path(told["run"])
        name = path.name if path == directory else path.relative_to(directory)
        about = f"{name}\n{told['recipe'] or '-'}, {told['state']}"
        table.add_row(*map(Text, (about, *_figures(told))))
    console.print(table)


def _figures(told):
    """Epochs, best score, last loss, time and when it was last written, in words."""
    epochs = f"{told['epochs_done']}/{told['epochs'] or '-'}"
    loss = "-" if told["last_loss"] is None else f"{told['last_loss']:.4g}"
    wrote = "-"
    if told["last_written"] is not None:
        when = datetime.fromisoformat(told["last_written"])
        this_year = when.year == datetime.now().year
        wrote = when.strftime("%d %b %H:%M" if this_year else "%d %b %Y")
    return epochs, _best(told), loss, _duration(told["seconds"]), wrote


def _best(told):
    if told["best"] is None:
        return "-"
    if "iou" in told["score"]:
        return f"IoU {told['best']:.3f}"
    return f"{told['best']:.2%}"


def _duration(seconds):
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    return f"{seconds / 3600:.1f} h"


def _compare(directories, as_json, picture):
    """In what runs differ, and how good they were."""
    from training.history import differences, read_history, read_run

    if picture is not None:
        check_png(picture)
    different = differences(directories)
    told = [read_run(directory) for directory in directories]
    if picture is not None:
        from training.curves import draw_comparison

        names = _names(directories)
        histories = [read_history(directory) for directory in directories]
        draw_comparison(dict(zip(names, histories, strict=True)), picture)
    if as_json:
        print(json.dumps({"runs": told, "differences": different}, indent=2))
        return
    _print_comparison(_names(directories), different, told)
    for run in told:
        if run["reason"] is not None:
            say(f"Damaged: {run['run']}: {run['reason']}.")
    if picture is not None:
        say(f"Picture: {picture}")


def _names(directories):
    """Names of the runs, with as much of the path as tells them apart."""
    names = [path.resolve().name for path in directories]
    whole = len(set(names)) < len(names)
    return [str(path) for path in directories] if whole else names


def _print_comparison(names, different, told):
    table = Table()
    table.add_column("field", overflow="fold")
    for name in names:
        table.add_column(Text(name), overflow="fold")
    for key, values in different.items():
        table.add_row(*map(Text, (key, *map(_short, values))))
    table.add_section()
    titles = ("epochs", "best score", "last loss", "time", "last wrote")
    for title, *values in zip(titles, *map(_figures, told), strict=True):
        table.add_row(title, *map(Text, values))
    best = ["-" if x["best_epoch"] is None else str(x["best_epoch"]) for x in told]
    table.add_row("best epoch", *best)
    table.add_row("state", *(x["state"] for x in told))
    console.print(table)


def _short(value):
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    text = text.strip('"')
    return text if len(text) <= 60 else f"{text[:57]}..."
