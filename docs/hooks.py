"""What mkdocs fills in while it builds the pages: the reference of the command line."""

import runpy
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).parent.parent
MARK = "<!-- commands -->"


def on_page_markdown(markdown, **_):
    """Put the commands where a page asks for them."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands():
    """Every command with its arguments and options, as Markdown.

    The file is run and not imported, for importing keras_vit takes seconds.
    """
    sys.path.insert(0, str(ROOT))
    try:
        app = runpy.run_path(str(ROOT / "keras_vit/__main__.py"), run_name="app")["app"]
    finally:
        sys.path.remove(str(ROOT))
    group = typer.main.get_command(app)
    return "\n".join(describe(name, x) for name, x in group.commands.items())


def describe(name, command):
    """One command: its usage, what it does, and a table of what it takes."""
    with command.make_context(name, [], resilient_parsing=True) as context:
        usage = " ".join(["keras-vit", name, *command.collect_usage_pieces(context)])
        records = [x.get_help_record(context) for x in command.params]
    rows = [f"| `{what}` | {escape(text)} |" for what, text in filter(None, records)]
    table = ["| | |", "|---|---|", *rows, ""] if rows else []
    help_text = (command.help or "").strip()
    parts = [f"## keras-vit {name}", f"```text\n{usage}\n```", help_text]
    return "\n\n".join(parts) + "\n\n" + "\n".join(table)


def escape(text):
    """Help as it stands in a terminal, so that a cell of a table holds it."""
    words = " ".join(text.replace("|", r"\|").split())
    return words.replace("*", r"\*").replace("<", "&lt;").replace("_", r"\_")
