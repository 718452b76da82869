"""The linter, the import contracts, and the size of files."""

import subprocess
import sys
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
