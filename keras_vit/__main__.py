"""The command line: keras-vit demo, train, annotate, export, predict and others."""

import os
import sys
from pathlib import Path
from typing import Annotated

from training.command import parse_changes, parse_size

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
AnySize = Annotated[
    str | None,
    typer.Option(help="Pixels, N or HxW, for a model that takes any size."),
]
DATA = "digits, digit_scenes:SIZE, placed_digits:SIZE, tfds:NAME or folder:PATH."


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
        Path | None,
        typer.Option(help="Where the run is kept.", show_default="runs/RECIPE"),
    ] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value, as epochs=3 or depth=6."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label maps of the data, from `annotate`.")
    ] = None,
) -> None:
    """Train by a recipe; run the same command again to resume."""
    from training.recipes import find_recipe

    chosen = find_recipe(recipe)
    if data is not None:
        chosen = chosen.replace(data=data)
    chosen = chosen.replace(**parse_changes(change or []))
    run_dir = run_dir or Path("runs") / recipe

    import training

    images = training.load_data(chosen.data)
    if labels is not None and chosen.token_labeling is None:
        raise ValueError(
            f"--labels is for recipes that label tokens, {chosen.name!r} labels none; "
            "add --set 'token_labeling={}' to label them."
        )
    if labels is not None:
        images = training.with_label_maps(images, labels)
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
def annotate(
    teacher: Annotated[Path, typer.Option(help="Classifier: a .keras file or a run.")],
    data: Annotated[str, typer.Option(help=DATA)],
    out: Annotated[Path, typer.Option(help="Folder for the label maps.")],
    top: Annotated[
        int | None,
        typer.Option(help="Classes a place.", show_default="5, or all of at most 16"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 32,
    shard_size: Annotated[int, typer.Option(help="Images a file.")] = 512,
    image_size: AnySize = None,
    normalization: Annotated[
        str | None,
        typer.Option(help="inception or imagenet.", show_default="the teacher does it"),
    ] = None,
    runner: Annotated[
        str | None, typer.Option(help="An Apache Beam runner, as DirectRunner.")
    ] = None,
) -> None:
    """Score maps of training images by a teacher; run it again to resume."""
    import training
    from training.files import model_file

    path, names = model_file(teacher)
    size = None if image_size is None else parse_size(image_size)
    images = training.load_data(data)
    if names not in (None, list(images.labels)):
        raise ValueError(
            f"The run {teacher} must have the labels of {data}, it has "
            f"{', '.join(names[:10])}."
        )
    store = training.annotate(
        path,
        images,
        out,
        top=top,
        batch_size=batch_size,
        shard_size=shard_size,
        normalization=normalization,
        image_size=size,
        runner=runner,
    )
    console.print(f"{out}: {store.summary()}", soft_wrap=True)
    console.print(f"Next: keras-vit train ... --labels {out}", soft_wrap=True)


@app.command()
def labels(
    directory: Annotated[Path, typer.Argument(help="Folder of label maps.")],
) -> None:
    """Check the label maps that `annotate` made, every byte of them."""
    import training

    store = training.open_labels(directory)
    store.check()
    console.print(f"{directory}: {store.summary()}. OK", soft_wrap=True)


@app.command()
def evaluate(
    model: RunOrFile,
    data: Annotated[str, typer.Option(help=DATA)],
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 64,
    image_size: AnySize = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="PNG file of images, labels and answers (pixels, tokens)."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Label maps for the picture, from `annotate`.")
    ] = None,
) -> None:
    """Accuracy, loss and mean IoU of a model on the held-out part of a dataset."""
    import training
    from keras_vit.model_file import read_model
    from training.files import model_file
    from training.picture import draw_segmentation
    from training.task import is_segmentation
    from training.token_picture import draw_tokens

    path, _ = model_file(model)
    size = None if image_size is None else parse_size(image_size)
    network = read_model(path)
    has_tokens = "token_head" in [layer.name for layer in network.layers]
    if picture is not None and not (is_segmentation(network) or has_tokens):
        raise ValueError(
            "--picture is for models that answer for each pixel or each token; this "
            "model gives one answer an image."
        )
    images = training.load_data(data)
    if labels is not None:
        images = training.with_label_maps(images, labels)
    if picture is not None and has_tokens and images.label_maps is None:
        raise ValueError(
            f"A picture of tokens needs label maps, {data!r} has none; make some with "
            "keras-vit annotate and give them as --labels."
        )
    result = training.evaluate(network, images, batch_size, size)
    figures = f"accuracy {result['accuracy']:.2%}, loss {result['loss']:.4f}"
    if images.masks:
        figures = f"mean IoU {result['mean_iou']:.4f}, pixel {figures}"
    count = images.sizes["validation"]
    console.print(f"{count} held-out images of {data}: {figures}", soft_wrap=True)
    if picture is not None:
        if has_tokens:
            draw_tokens(network, images, picture)
        else:
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
        int | None, typer.Option(help="Number.", show_default="the next one")
    ] = None,
) -> None:
    """Export a model as a SavedModel that TensorFlow Serving answers from."""
    from export import export_saved_model
    from training.files import model_file

    path, names = model_file(model)
    if labels is not None:
        if not labels.is_file():
            raise FileNotFoundError(f"There is no file of labels {labels}.")
        names = [x.strip() for x in labels.read_text().splitlines() if x.strip()]
    published = export_saved_model(path, directory, names, version=version)
    console.print(f"Exported and verified: {published}")
    console.print(f"Next: keras-vit predict {published} IMAGE ...")


@app.command()
def verify(directory: Served) -> None:
    """Check everything an exported model promises, in the C++ runtime."""
    from export import verify as check
    from export.predict import newest_version

    report = check(newest_version(directory))
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
    from export.predict import image_files, newest_version, predict_files

    files = [file for path in images for file in image_files(path)]
    answers = list(predict_files(newest_version(directory), files, top, label_maps))
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


def _print_report(report) -> None:
    table = Table("check", "", "figure")
    for check in report.checks:
        mark = "[green]ok[/]" if check.ok else "[red]FAILS[/]"
        table.add_row(check.name, mark, check.detail)
    console.print(table)


def _predict_held_out(version: Path, data, directory: Path) -> tuple[float, Path]:
    """Classify every held-out image through the artifact; picture of the first 24."""
    from export.predict import classify_files
    from training.picture import draw_answers

    examples = list(data.stream("validation").as_numpy_iterator())
    files = [data.read(handle) for handle, _ in examples]
    files = [x if isinstance(x, bytes) else x.numpy() for x in files]
    truth = [data.labels[label] for _, label in examples]
    answers = classify_files(version, files)

    folder = directory / "images"
    folder.mkdir(parents=True, exist_ok=True)
    # The first of them, and every one that is wrong: what a reader wants to see.
    wrong = [i for i, (name, _) in enumerate(answers) if name != truth[i]]
    right = [i for i in range(len(files)) if i not in wrong]
    shown = [*right[: max(0, 24 - len(wrong))], *wrong][:24]
    paths = [folder / f"{i:03d}_is_{truth[i]}.png" for i in shown]
    for path, i in zip(paths, shown, strict=True):
        path.write_bytes(files[i])
    picture = directory / "predictions.png"
    draw_answers(paths, [(*answers[i], truth[i]) for i in shown], picture)
    return 1 - len(wrong) / len(files), picture


if __name__ == "__main__":
    main()
