"""The command for many images at once."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer()
console = Console(highlight=False)


@app.command("predict-batch")
def predict_batch(
    directory: Annotated[
        Path, typer.Argument(help="Version directory, or the folder of versions.")
    ],
    source: Annotated[
        str,
        typer.Argument(help="Folder, glob pattern in quotes, or tfds:NAME/SPLIT."),
    ],
    out: Annotated[Path, typer.Argument(help=".csv, .jsonl or .parquet, a new file.")],
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Classes a row.", show_default="all that it names"),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, help="Images that are written together.")
    ] = 256,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where tensorflow-datasets keeps its data.")
    ] = None,
    runner: Annotated[str, typer.Option(help="Of Apache Beam.")] = "DirectRunner",
    beam: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, an option of Apache Beam's; as often as needed."
        ),
    ] = None,
) -> None:
    """Ask the exported model about all images of a source; again to go on."""
    from export.batch import predict_batch

    written = predict_batch(
        directory,
        source,
        out,
        top=top,
        shard_size=shard_size,
        data_dir=data_dir,
        runner=runner,
        beam_options=[f"--{option}" for option in beam or ()],
    )
    console.print(f"{written.images} images, {written.damaged} damaged: {written.out}")
