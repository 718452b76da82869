"""What the package is as a whole: what its import brings along."""

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
    """The count of parameters, then a list of what was imported and should not be."""
    code = (
        "import keras_vit; print(keras_vit.ViT('small').count_params());"
        "import sys; print(*(name for name in sys.argv[1:] if name in sys.modules))"
    )
    unwanted = ["training", "export", "typer", "tensorflow_datasets"]
    if keras.backend.backend() != "tensorflow":
        unwanted.append("tensorflow")
    result = run(sys.executable, "-c", code, *unwanted)
    assert result.stdout.splitlines() == ["22050664", ""], result.stderr


@pytest.mark.first
def test_naming_training_does_not_load_its_loop():
    code = "import training, export, sys; assert 'training.loop' not in sys.modules"
    assert run(sys.executable, "-c", code).returncode == 0
