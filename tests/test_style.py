"""The linter, the import contracts, and the size of files."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "format", "--check", "."),
        ("ruff", "check", "."),
        ("lint-imports",),
    ],
    ids=" ".join,
)
def test_style_and_arrows(command):
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_are_small():
    files = [*ROOT.glob("*/*.py")]
    assert len(files) > 20
    long = {f.name: len(f.read_text().splitlines()) for f in files}
    assert {name: n for name, n in long.items() if n > 400} == {}


def test_all_of_training_but_one_room_is_closed_to_the_export():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    closed = {x["name"]: x.get("forbidden_modules") for x in contracts}
    rooms = {f"training.{x.stem}" for x in (ROOT / "training").glob("[a-z]*.py")}
    expected = sorted(rooms - {"training.preprocess"})
    assert closed["export enters training.preprocess alone"] == expected
