"""The command line: keras-vit demo, train, convert, export, predict and others."""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

from training.command import load_tensorflow, parse_changes

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # likewise

try:
    import typer
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    sys.exit(f'The command line needs {error.name}: pip install "keras-vit[demo]"')

from export import commands_batch, commands_serve, commands_versions
from training import commands, commands_runs, options
from training.commands import console, say

Served = Annotated[
    Path, typer.Argument(help="Version directory, or the folder of versions.")
]

# What answers without TensorFlow.
LIGHT = (*commands_runs.LIGHT, *commands_serve.LIGHT, *commands_versions.LIGHT)

app = typer.Typer(
    name="keras-vit",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Vision transformers in Keras 3: train, export, verify, predict.",
)
checkpoints = typer.Typer()
exporting = typer.Typer()


@app.callback()
def start(context: typer.Context) -> None:
    """Load what takes seconds, and say so meanwhile."""
    if context.invoked_subcommand in LIGHT:
        return
    with console.status("loading TensorFlow"):
        load_tensorflow()


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
    from export.predict import classify_files
    from training.picture import draw_held_out

    recipe = training.RECIPES["digits"]
    console.rule("1. train")
    console.print(
        f"A ViT on {recipe.data}, {recipe.epochs} epochs, {recipe.expected}; "
        f"backend {keras.backend.backend()}."
    )
    data = training.load_data(recipe.data)
    run = directory / "run"
    model = training.fit(
        lambda: recipe.build_model(len(data.labels), data.labels), data, recipe, run
    )
    console.rule("2. export")
    version = export_saved_model(model, directory / "models" / "digits", data.labels)
    console.rule("3. verify in the TensorFlow C++ runtime")
    report = verify(version)
    _print_report(report)
    console.rule("4. predict held-out files, encoded as they are")
    classify = functools.partial(classify_files, version)
    accuracy, picture = draw_held_out(data, classify, directory)
    console.rule("done")
    console.print(f"run        {run}  (curves.png, best.keras, last.keras)")
    console.print(f"images     {directory / 'images'}")
    console.print(f"picture    {picture}")
    console.print(f"artifact   {version}")
    console.print("\nNext:")
    console.print(f"  keras-vit predict {version} {directory / 'images'}")
    console.print(f"  keras-vit verify {version}")
    console.print(f"  keras-vit serve {version.parent}")
    console.print("  keras-vit train digits --data folder:MY_IMAGES")
    console.print(
        f"\nAccuracy of the artifact on {data.sizes['validation']} held-out images: "
        f"{accuracy:.2%}"
    )
    held = sum(check.ok for check in report.checks)
    console.print(f"Artifact verified: {held} of {len(report.checks)} checks hold.")
    if not report.ok:
        raise typer.Exit(1)


@checkpoints.command()
def inspect(source: options.Source, change: options.Change = None) -> None:
    """Say what a checkpoint is, and which model it would become."""
    from training import convert

    report = convert.inspect(source, **parse_changes(change or []))
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in report.rows():
        table.add_row(Text(name), Text(text))
    console.print(table)
    say(f"Next: keras-vit convert {source} model.keras")


@checkpoints.command()
def convert(
    source: options.Source,
    out: Annotated[
        Path, typer.Argument(help="A .keras file; with --layout another, or a folder.")
    ],
    image_size: options.Size = None,
    change: options.Change = None,
    layout: Annotated[
        str | None,
        typer.Option(help="timm or hf: a folder or a .safetensors file for these."),
    ] = None,
) -> None:
    """Load a checkpoint and write it as a .keras file, or back in another layout."""
    from training import convert

    overrides = parse_changes(change or [], image_size)
    report, sentences = convert.convert(source, out, layout, **overrides)
    for sentence in sentences:
        say(sentence)
    say(f"{report.family} of {report.parameters:,} parameters: {out}")
    if layout is not None:
        say(f"Next: keras-vit inspect {out}")
        return
    say(f"Next: keras-vit train finetune --from {out} --data folder:PHOTOS")
    say(f"      keras-vit export {out} models/{out.stem}")


@exporting.command()
def export(
    model: options.RunOrFile,
    directory: Annotated[
        Path,
        typer.Argument(help="Folder of the versions; or a .onnx, .tflite, .xml file."),
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one label a line; a run or model may know its own."
        ),
    ] = None,
    version: Annotated[
        int | None, typer.Option(help="Number.", show_default="the next one")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="float32 or bfloat16: what it computes in.",
            show_default="that of the model",
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Blocks whose maps are answered, such as 3,7,-1 or block3.",
            show_default="the last",
        ),
    ] = None,
    freeze: Annotated[
        bool | None,
        typer.Option(
            help="Weights as constants: faster on a CPU, more memory.",
            show_default="for bfloat16 up to 256 MiB",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="On whose held-out images a --precision is judged.",
            show_default="that of a run, or noise",
        ),
    ] = None,
) -> None:
    """Export a model as a SavedModel that TensorFlow Serving answers from.

    A path that ends in .onnx, .tflite or .xml is a file for ONNX Runtime, LiteRT or
    OpenVINO instead; any other ending that a folder does not have yet is refused.
    """
    from export import export_saved_model
    from export.precision import check_precision, computes_in, precision_cost
    from export.targets import check_target, export_to
    from keras_vit.model_file import read_model
    from training.evaluation import held_out
    from training.files import model_file

    is_file = directory.suffix[1:].isalpha() and not directory.is_dir()
    if is_file:
        name = check_target(directory)
        given = {"version": version, "precision": precision}
        given |= {"freeze": freeze, "data": data, "features": features}
        for option, value in given.items():
            if value is not None:
                raise ValueError(f"A file of {name} has no --{option}, got {value}.")

    path, names = model_file(model)
    if labels is not None:
        if not labels.is_file():
            raise FileNotFoundError(f"There is no file of labels {labels}.")
        names = [x.strip() for x in labels.read_text().splitlines() if x.strip()]
    if is_file:
        written = export_to(path, directory, names)
        console.print(f"Exported, and checked in {name}'s own runtime: {written}")
        return
    check_precision(precision)
    if data is not None and precision != "bfloat16":
        raise ValueError(f"--data is for --precision bfloat16, got {precision}.")
    lowers = precision == "bfloat16" != computes_in(read_model(path))
    samples = held_out(path, data) if lowers else None
    published = export_saved_model(
        path,
        directory,
        names,
        version=version,
        features=None if features is None else _layers(features),
        precision=precision,
        freeze=freeze,
        samples=samples,
    )
    cost = precision_cost(published)
    if cost is not None:
        console.print(f"{precision} beside the model, {cost}")
    console.print(f"Exported and verified: {published}")
    console.print(f"Next: keras-vit predict {published} IMAGE ...")


def _layers(names: str) -> list[int | str]:
    """Numbers and names of blocks, divided by commas."""
    given = [x.strip() for x in names.split(",")]
    return [int(x) if x.removeprefix("-").isdecimal() else x for x in given]


@exporting.command()
def verify(
    directory: Served,
    runtime: Annotated[
        Path | None,
        typer.Option(
            metavar="PYTHON",
            help="Interpreter of an environment with another TensorFlow.",
            show_default="this one",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.")
    ] = False,
) -> None:
    """Check everything an exported model promises, in the C++ runtime."""
    from export import verify as check
    from export.predict import newest_version

    python = runtime or sys.executable
    report = check(newest_version(directory), runtime=python, progress=not as_json)
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print_report(report)
    if not report.ok:
        failed = [x.name for x in report.checks if not x.ok]
        raise ValueError(f"{report.directory} does not hold: {', '.join(failed)}.")
    if not as_json:
        console.print(
            f"{report.directory}: all {len(report.checks)} checks hold "
            f"in TensorFlow {report.runtime}."
        )


@exporting.command()
def predict(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[DIRECTORY] IMAGE...",
            help="Version directory, or the folder of versions (not with --server); "
            "image files or folders.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 3,
    label_maps: Annotated[
        Path | None, typer.Option(help="Folder for label maps (segmentation).")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(help="Ask a server: http://HOST:8501 or grpc://HOST:8500."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the model on the server.")
    ] = None,
) -> None:
    """Ask an exported model about image files: in the C++ runtime, or on a server."""
    from export.predict import image_files, newest_version, predict_files

    images = paths if server is not None else paths[1:]
    if not images:
        raise ValueError("predict needs an image after the directory, or --server.")
    files = [file for path in images for file in image_files(path)]
    if server is not None:
        from export.client import Client, ask_files

        with Client(server, model) as client:
            answers = list(ask_files(client, files, top, label_maps))
    else:
        version = newest_version(paths[0])
        answers = list(predict_files(version, files, top, label_maps))
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


# In the order of `--help`.
PARTS = (
    commands.app,
    commands_runs.app,
    checkpoints,
    exporting,
    commands_serve.app,
    commands_versions.app,
    commands_batch.app,
)
for part in PARTS:
    app.add_typer(part)


def main() -> None:
    """Run the command line; an expected error is one sentence and exit status 1.

    With the environment variable KERAS_VIT_TRACEBACK=1 the traceback is shown.
    """
    try:
        app(prog_name="keras-vit")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
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


if __name__ == "__main__":
    main()
