"""What mkdocs does besides: the reference of the command line, links of notebooks."""

import logging
import posixpath
import re
import runpy
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).parent.parent
MARK = "<!-- commands -->"
OTHER_PLACES = {"README.md": "index.md", "benchmarks/README.md": "benchmarks.md"}
log = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown, **_):
    """Put the commands where a page asks for them."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def on_page_content(html, page, files, **_):
    """Let the links of a notebook, which hold in the repository, hold in the site."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def replace(match):
        path, hash_, anchor = match[1].partition("#")
        place = posixpath.normpath(posixpath.join("notebooks", path))
        source = OTHER_PLACES.get(place, place.removeprefix("docs/"))
        target = files.get_file_from_path(source)
        if target is None:
            log.warning("%s links to %s, no page.", page.file.src_uri, match[1])
            return match[0]
        return f'href="{target.url_relative_to(page.file)}{hash_}{anchor}"'

    return re.sub(
        r'href="(?!\w+:|[#/])([^"]+\.(?:md|ipynb)(?:#[^"]*)?)"', replace, html
    )


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
