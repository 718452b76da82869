"""Commands on the folder of a model's versions; none of them needs TensorFlow."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

LIGHT = ("versions", "rollback", "prune", "upload")  # without TensorFlow
Folder = Annotated[Path, typer.Argument(help="Folder of the versions.")]

app = typer.Typer()
console = Console(highlight=False, soft_wrap=True)


@app.command()
def versions(directory: Folder) -> None:
    """List the versions of an exported model, and which of them are served."""
    from export import versions as published

    found = _found(directory)
    live = published.served(directory)
    table = Table()
    table.add_column("version", justify="right")
    for name in ("date", "size", "model", "verified", "served"):
        table.add_column(name, justify="right" if name == "size" else "left")
    for version in reversed(found):
        told = published.describe(version)
        verified = {True: "yes", False: "no", None: "no report"}[told["verified"]]
        model = told["model"] or "-"
        if told["copy_of"] is not None:
            model += f" (copy of {told['copy_of']})"
        labels = live.get(version.number)
        state = "" if labels is None else ", ".join(["yes", *labels])
        date = told["date"].strftime("%Y-%m-%d %H:%M")
        cells = (str(version.number), date, _size(told["bytes"]), model, verified)
        table.add_row(*map(Text, (*cells, state)))
    console.print(table)
    for number, names in published.duplicates(directory).items():
        _say(
            f"{' and '.join(names)} are one number: a server loads {names[-1]} as "
            f"{number} and ignores the rest."
        )


@app.command()
def rollback(
    directory: Folder,
    to: Annotated[
        int | None,
        typer.Option(help="Version.", show_default="the one before the served one"),
    ] = None,
) -> None:
    """Serve an older version again, by publishing a copy of it as the newest."""
    from export import versions as published

    before = _found(directory)[-1].number
    path = published.rollback(directory, to)
    told = published.describe(published.Version(int(path.name), path))
    _say(
        f"Published: {path}, a copy of version {told['copy_of']}, instead of {before}."
    )
    live = published.served(directory)
    if int(path.name) not in live:
        _say(
            f"But bundle/models.config pins {', '.join(map(str, live))}: a server that "
            "reads it goes on with that."
        )


@app.command()
def prune(
    directory: Folder,
    keep: Annotated[
        int, typer.Option(min=1, help="How many of the newest versions stay.")
    ] = 3,
) -> None:
    """Delete old versions; never one that is served."""
    from export import versions as published

    _found(directory)
    deleted = published.prune(directory, keep)
    left = ", ".join(str(x.number) for x in published.versions(directory))
    _say(f"Deleted: {', '.join(map(str, deleted)) or 'none'}. There are: {left}.")


@app.command()
def upload(
    version: Annotated[
        Path,
        typer.Argument(help="Version directory, or a folder of versions: the newest."),
    ],
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="s3://, gs:// ... of the model's versions."),
    ],
) -> None:
    """Copy a version to an object store, so that a server never sees half of it."""
    try:
        import fsspec  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{error}. An upload needs pip install "keras-vit[upload]", and s3fs or '
            "gcsfs for such a store."
        ) from error
    from export.upload import upload as send

    if not (version / "saved_model.pb").is_file():
        version = _found(version)[-1].path
    _say(f"Uploaded: {send(version, url)}")


def _found(directory: Path):
    from export import versions as published

    found = published.versions(directory)
    if not found:
        raise FileNotFoundError(
            f"{directory} must be a folder of versions: it has no numbered folder."
        )
    return found


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _say(text: str) -> None:
    console.print(text, markup=False)
