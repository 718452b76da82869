"""What the package is as a whole: what its import brings along."""

import importlib.util
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


@pytest.mark.first
def test_the_process_of_an_export_imports_no_more_than_it_needs():
    """Keras and TensorFlow import all three where they are."""
    names = ("jax", "matplotlib", "sklearn")
    assert any(importlib.util.find_spec(name) for name in names)
    for module in ("export.worker", "export.target_worker"):
        code = (
            "import runpy, sys; from export import lean; "
            "runpy.run_module = lambda name, **_: __import__(name);"
            f"sys.argv[1:] = [{module!r}]; lean.main();"
            f"assert {module!r} in sys.modules;"
            f"print(*(x for x in {names} if x in sys.modules))"
        )
        result = run(sys.executable, "-c", code)
        assert result.stdout == "\n", result.stderr
