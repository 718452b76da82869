"""Every notebook, run from its first cell to its last in an empty folder."""

import base64
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = ("fine_tune", "first_vit", "positions", "serving", "token_labeling")


def read(path):
    return nbformat.read(path, as_version=4)


def outputs_of(notebook):
    return [x for cell in notebook.cells for x in cell.get("outputs", ())]


def pictures_of(outputs):
    return [x["data"]["image/png"] for x in outputs if "image/png" in x.get("data", {})]


def text_of(notebook):
    """What its cells printed."""
    return "".join(x.get("text", "") for x in outputs_of(notebook))


def number(text, after):
    """The first number behind these words, a share where it has a percent sign."""
    found = re.search(rf"{after}\D*?([-+]?[\d.]+)(%?)", text)
    return float(found[1]) / (100 if found[2] else 1)


@pytest.mark.first
def test_they_are_there_with_their_outputs_and_nothing_of_a_machine():
    assert tuple(path.stem for path in NOTEBOOKS) == NAMES
    for path in NOTEBOOKS:
        notebook, text = read(path), path.read_text()
        cells = [x for x in notebook.cells if x.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        kinds = {output.output_type for output in outputs_of(notebook)}
        assert "display_data" in kinds and "error" not in kinds
        assert not re.search(r"/tmp/|/home/|/root|/work/| at 0x", text)
        assert '"stderr"' not in text


@pytest.mark.first
def test_the_pictures_of_the_readme_are_those_of_the_first_notebook():
    shown = pictures_of(outputs_of(read(ROOT / "notebooks/first_vit.ipynb")))
    shown = [base64.b64decode(x) for x in shown]
    for name in ("rollout", "positions"):
        assert (ROOT / f"docs/{name}.png").read_bytes() in shown


def check_first_vit(text):
    assert number(text, "held-out accuracy") > 0.95


def check_fine_tune(text):
    assert "(1, 17, 64) -> (1, 65, 64)" in text and "(64, 6) -> (64, 4)" in text
    assert number(text, "from the checkpoint") > number(text, "from nothing")


def check_positions(text):
    """Similarity against nearness on a trained table, and on 200 shuffled ones."""
    assert number(text, "trained ") > 0.15
    assert abs(number(text, "shuffled ")) < 0.05
    assert number(text, "trained ") > number(text, "the highest of 200:")
    nothing, table, peg = (
        number(text, rf"{name} +[\d,]+ parameters, held out")
        for name in ("nothing", "table", "PEG")
    )
    assert nothing < table - 0.1 and nothing < peg - 0.1


def check_serving(text):
    held, all_of_them = re.search(r"(\d+) of (\d+) checks hold", text).groups()
    assert held == all_of_them
    assert number(text, "over HTTP, ") == number(text, "held out ")
    assert "False -" in text and "Version 2 is served." in text


def check_token_labeling(text):
    assert number(text, "held-out accuracy") > 0.8


@pytest.mark.first
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_says(path, tmp_path, monkeypatch):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    notebook, before = read(path), read(path)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, resources=place).execute()
    globals()[f"check_{path.stem}"](text_of(notebook))
    for old, new in zip(before.cells, notebook.cells, strict=True):
        shown = [len(pictures_of(x.get("outputs", ()))) for x in (old, new)]
        assert shown[0] == shown[1], new.source


@pytest.mark.first
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_its_words_say(path):
    globals()[f"check_{path.stem}"](text_of(read(path)))
