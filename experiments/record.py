"""Rows of results in CSV files, which are replaced at once."""

import csv
import io
import os
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The rows of a CSV file, numbers as numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: _number(x) for k, x in row.items()} for row in csv.DictReader(file)]


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a CSV file by one of these rows; what a row lacks is empty."""
    names = dict.fromkeys(name for row in rows for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Replace a file, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
