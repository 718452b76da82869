"""Arguments and options that several commands of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

DATA = (
    "digits, digit_scenes:SIZE, placed_digits:SIZE, tfds:NAME, folder:PATH or "
    "arrays:FILE.npz."
)
SOURCE = "a file, a folder, hf:OWNER/NAME, or a run directory."

AnySize = Annotated[
    str | None,
    typer.Option(help="Pixels, N or HxW, for a model that takes any size."),
]
Change = Annotated[
    list[str] | None,
    typer.Option("--set", help="Another value, as epochs=3 or image_size=null."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option("--from", help=f"Checkpoint to fine-tune: {SOURCE}"),
]
Data = Annotated[str | None, typer.Option(help=DATA)]
DataDir = Annotated[
    str | None,
    typer.Option(
        help="Folder of tensorflow-datasets, also gs:// and the like.",
        show_default="its own",
    ),
]
LabelMaps = Annotated[
    Path | None, typer.Option(help="Label maps of the data, from `annotate`.")
]
RecipeName = Annotated[str, typer.Argument(help="Name of a recipe, such as digits.")]
RunOrFile = Annotated[
    Path, typer.Argument(help="Run directory (its last model) or a .keras file.")
]
Served = Annotated[
    Path, typer.Argument(help="Version directory, or the folder of versions.")
]
Size = Annotated[
    str | None, typer.Option(help="Pixels that the model shall have, N or HxW.")
]
Source = Annotated[str, typer.Argument(help=f"Checkpoint: {SOURCE}")]
