"""What the package is as a whole: its imports, its style, its shape."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent


def run(*command, **environment):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def test_import_needs_one_backend_and_nothing_else_of_ours():
    """The issue's own line, then what it must not have pulled in."""
    code = (
        "import keras_vit; print(keras_vit.ViT('small').count_params());"
        "import sys; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    )
    others = {"tensorflow", "jax", "torch"} - {keras.backend.backend()}
    unwanted = ["training", "export", "typer", "tqdm", "tensorflow_datasets"]
    if keras.backend.backend() != "tensorflow":  # Keras on TensorFlow imports others
        unwanted += others
    result = run(sys.executable, "-c", code, *unwanted)
    assert result.stdout.splitlines() == ["22050664", ""], result.stderr


def test_naming_training_does_not_load_its_loop():
    code = "import training, export, sys; assert 'training.loop' not in sys.modules"
    assert run(sys.executable, "-c", code).returncode == 0


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
    result = run(str(program), *command[1:])
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_are_small():
    files = [*ROOT.glob("*/*.py")]
    assert len(files) > 20
    long = {f.name: len(f.read_text().splitlines()) for f in files}
    assert {name: n for name, n in long.items() if n > 400} == {}
