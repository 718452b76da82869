"""The command line: keras-vit demo, train, evaluate, export, verify, predict."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    sys.exit(f'The command line needs {error.name}: pip install "keras-vit[demo]"')

app = typer.Typer(
    name="keras-vit",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Vision transformers in Keras 3: train, export, verify, predict.",
)
console = Console(highlight=False)

RunOrFile = Annotated[
    Path, typer.Argument(help="Run directory (its last model) or a .keras file.")
]
Served = Annotated[
    Path, typer.Argument(help="Version directory, or the folder of versions.")
]
DATA = "digits, digit_scenes:SIZE, tfds:NAME or folder:PATH."


@app.callback()
def start() -> None:
    """Import TensorFlow without the lines that it logs before it can be told not to."""
    stderr = os.dup(2)
    with console.status("loading TensorFlow"), Path(os.devnull).open("w") as silence:
        try:
            sys.stderr.flush()
            os.dup2(silence.fileno(), 2)
            import tensorflow as tf

            tf.config.list_physical_devices()
        except ImportError as error:
            raise RuntimeError(
                f'{error}. The command line needs pip install "keras-vit[demo]"'
            ) from error
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@app.command()
def demo(
    directory: Annotated[
        Path, typer.Option(help="Where everything is written.")
    ] = Path("keras-vit-demo"),
) -> None:
    """Train on real digits, export, verify in the C++ runtime, predict."""
    import keras

    import training
    from export import export_saved_model, verify

    recipe = training.RECIPES["digits"]
    console.rule("1. train")
    console.print(
        f"A ViT on {recipe.data}, {recipe.epochs} epochs, {recipe.expected}; "
        f"backend {keras.backend.backend()}."
    )
    data = training.load_data(recipe.data)
    run = directory / "run"
    model = training.fit(
        lambda: recipe.build_model(len(data.labels)), data, recipe, run
    )
    console.rule("2. export")
    version = export_saved_model(model, directory / "models" / "digits", data.labels)
    console.rule("3. verify in the TensorFlow C++ runtime")
    report = verify(version)
    _print_report(report)
    console.rule("4. predict held-out files through image_bytes")
    accuracy, picture = _predict_held_out(version, data, directory)
    console.rule("done")
    console.print(f"run        {run}  (history.csv, best.keras, last.keras)")
    console.print(f"images     {directory / 'images'}")
    console.print(f"picture    {picture}")
    console.print(f"artifact   {version}")
    console.print("\nNext:")
    console.print(f"  keras-vit predict {version} {directory / 'images'}")
    console.print(f"  keras-vit verify {version}")
    console.print("  keras-vit train digits --data folder:MY_IMAGES")
    console.print(
        f"\nAccuracy of the artifact on {data.sizes['validation']} held-out images: "
        f"{accuracy:.2%}"
    )
    held = sum(check.ok for check in report.checks)
    console.print(f"Artifact verified: {held} of {len(report.checks)} checks hold.")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as digits.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run is kept [default: runs/RECIPE].")
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value, as epochs=3 or depth=6."),
    ] = None,
) -> None:
    """Train by a recipe; run the same command again to resume."""
    from training.recipe import find_recipe

    chosen = find_recipe(recipe)
    if data is not None:
        chosen = chosen.replace(data=data)
    chosen = chosen.replace(**_parse(change or []))
    run_dir = run_dir or Path("runs") / recipe

    import training

    images = training.load_data(chosen.data)
    model = training.fit(
        lambda: chosen.build_model(len(images.labels)), images, chosen, run_dir
    )
    history = (run_dir / "history.csv").read_text().splitlines()
    last = dict(zip(history[0].split(","), history[-1].split(","), strict=True))
    held_out = f"accuracy {float(last['val_accuracy']):.2%}"
    following = f"keras-vit export {run_dir} models/{recipe}"
    if images.masks:
        held_out = f"mean IoU {float(last['val_mean_iou']):.4f}, pixel {held_out}"
        following = f"keras-vit evaluate {run_dir} --data {chosen.data} --picture x.png"
    console.print(
        f"{model.name}: {last['epoch']} epochs done, held-out {held_out}. "
        f"Run kept in {run_dir}",
        soft_wrap=True,
    )
    console.print(f"Next: {following}", soft_wrap=True)


@app.command()
def evaluate(
    model: RunOrFile,
    data: Annotated[str, typer.Option(help=DATA)],
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    image_size: Annotated[
        str | None,
        typer.Option(help="Pixels, N or HxW, for a model that takes any size."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG file of images, truth and prediction (segmentation)."),
    ] = None,
) -> None:
    """Accuracy, loss and mean IoU of a model on the held-out part of a dataset."""
    path, _ = _model_file(model)
    size = None if image_size is None else _size(image_size)

    import training
    from export.saved_model import read_model
    from training.picture import draw_segmentation
    from training.task import is_segmentation

    network = read_model(path)
    if picture is not None and not is_segmentation(network):
        raise ValueError(
            "--picture is for segmentation, a class for each pixel; this model gives "
            "one answer an image."
        )
    images = training.load_data(data)
    result = training.evaluate(network, images, batch_size, size)
    figures = f"accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}"
    if images.masks:
        figures = f"mean IoU {result['mean_iou']:.4f}, pixel {figures}"
    count = images.sizes["validation"]
    console.print(f"{count} held-out images of {data}: {figures}", soft_wrap=True)
    if picture is not None:
        draw_segmentation(network, images, picture, size)
        console.print(f"Picture: {picture}")


@app.command()
def export(
    model: RunOrFile,
    directory: Annotated[Path, typer.Argument(help="Folder of the versions.")],
    labels: Annotated[
        Path | None,
        typer.Option(help="Text file, one label a line; a run knows its own."),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Number [default: the next one].")
    ] = None,
) -> None:
    """Export a model as a SavedModel that TensorFlow Serving answers from."""
    path, names = _model_file(model)
    if labels is not None:
        if not labels.is_file():
            raise FileNotFoundError(f"There is no file of labels {labels}.")
        names = [x.strip() for x in labels.read_text().splitlines() if x.strip()]

    from export import export_saved_model

    published = export_saved_model(path, directory, names, version=version)
    console.print(f"Exported and verified: {published}")
    console.print(f"Next: keras-vit predict {published} IMAGE ...")


@app.command()
def verify(directory: Served) -> None:
    """Check everything an exported model promises, in the C++ runtime."""
    from export import verify as check

    report = check(_version(directory))
    _print_report(report)
    if not report.ok:
        failed = [x.name for x in report.checks if not x.ok]
        raise ValueError(f"{report.directory} does not hold: {', '.join(failed)}.")
    console.print(f"{report.directory}: all {len(report.checks)} checks hold.")


@app.command()
def predict(
    directory: Served,
    images: Annotated[list[Path], typer.Argument(help="Image files or folders.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 3,
    label_maps: Annotated[
        Path | None, typer.Option(help="Folder for label maps (segmentation).")
    ] = None,
) -> None:
    """Ask the exported model about image files, in the C++ runtime."""
    files = [file for path in images for file in _image_files(path)]

    from export.predict import predict_files

    answers = list(predict_files(_version(directory), files, top, label_maps))
    rows = [[str(file), *answer] for file, answer in answers if answer is not None]
    damaged = [str(file) for file, answer in answers if answer is None]
    if rows:
        width = max(len(row) for row in rows)
        table = Table("file", *(f"{i}." for i in range(1, width)))
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if damaged:
        raise ValueError(
            f"{', '.join(damaged)} must be a whole JPEG, PNG, GIF or BMP file; "
            "it could not be decoded."
        )


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1.

    With the environment variable KERAS_VIT_TRACEBACK=1 the traceback is shown.
    """
    try:
        app(prog_name="keras-vit")
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("KERAS_VIT_TRACEBACK"):
            raise
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def _parse(changes: list[str]) -> dict:
    """`["epochs=3", "pool=mean"]` to values: JSON where it is, else text."""
    values = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not (name and equals):
            raise ValueError(f"--set must be NAME=VALUE, got {change!r}.")
        try:
            values[name] = json.loads({"None": "null"}.get(text, text))
        except ValueError:
            values[name] = text
    return values


def _size(text: str) -> tuple[int, int]:
    """`"96"` or `"64x96"` to height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(x.isdecimal() and int(x) > 0 for x in sides):
        raise ValueError(f"--image-size must be N or HxW, in pixels, got {text!r}.")
    return int(sides[0]), int(sides[-1])


def _model_file(path: Path) -> tuple[Path, list[str] | None]:
    """The `.keras` file that is meant, and the labels where a run knows them."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"There is no run directory or model file {path}.")
        return path, None
    run = path / "run.json"
    if not (run.is_file() and (path / "last.keras").is_file()):
        raise FileNotFoundError(
            f"{path} must be a run directory with run.json and last.keras."
        )
    return path / "last.keras", json.loads(run.read_text())["labels"]


def _version(directory: Path) -> Path:
    """The version directory itself, or the newest version in a folder of versions."""
    if (directory / "saved_model.pb").is_file():
        return directory
    names = [x.name for x in directory.iterdir()] if directory.is_dir() else []
    numbers = [name for name in names if name.isdigit()]
    if not numbers:
        raise FileNotFoundError(
            f"{directory} must be an exported version (with saved_model.pb) or a "
            "folder of versions."
        )
    return directory / max(numbers, key=int)


def _image_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no image file or folder {path}.")
    suffixes = (".jpg", ".jpeg", ".png", ".gif", ".bmp")
    files = [x for x in sorted(path.rglob("*")) if x.suffix.lower() in suffixes]
    if not files:
        raise FileNotFoundError(f"{path} contains no image ({', '.join(suffixes)}).")
    return files


def _print_report(report) -> None:
    table = Table("check", "", "figure")
    for check in report.checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAILS[/]"
        table.add_row(check.name, mark, check.detail)
    console.print(table)


def _predict_held_out(version: Path, data, directory: Path) -> tuple[float, Path]:
    """Classify every held-out image through the artifact; picture of the first 24."""
    import numpy as np
    from tqdm.auto import tqdm

    from export import Runtime
    from export.session import strings
    from training.picture import draw_answers

    examples = list(data.stream("validation").as_numpy_iterator())
    files = [data.read(handle) for handle, _ in examples]
    files = [x if isinstance(x, bytes) else x.numpy() for x in files]
    truth = np.array([data.labels[label] for _, label in examples])
    classes, scores = [], []
    with Runtime(version) as runtime:
        for start in tqdm(range(0, len(files), 60), unit=" batches"):
            batch = strings(files[start : start + 60])
            answer = runtime.run("image_bytes", image_bytes=batch)
            classes += [name.decode() for name in answer["classes"][:, 0]]
            scores += answer["scores"][:, 0].tolist()

    folder = directory / "images"
    folder.mkdir(parents=True, exist_ok=True)
    # The first of them, and every one that is wrong: what a reader wants to see.
    wrong = [i for i, name in enumerate(classes) if name != truth[i]]
    right = [i for i in range(len(files)) if i not in wrong]
    shown = [*right[: max(0, 24 - len(wrong))], *wrong]
    shown = shown[:24]
    paths = [folder / f"{i:03d}_is_{truth[i]}.png" for i in shown]
    for path, i in zip(paths, shown, strict=True):
        path.write_bytes(files[i])
    picture = directory / "predictions.png"
    answers = [(classes[i], scores[i], truth[i]) for i in shown]
    draw_answers(paths, answers, picture)
    return float(np.mean(np.array(classes) == truth)), picture


if __name__ == "__main__":
    main()
