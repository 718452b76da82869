import os

import pytest
from test_command import program


def run(tmp_path, backend, *arguments):
    # Threads of PyTorch wait for each other by spinning, beside other tests for long.
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    result = program(*arguments, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_demo(tmp_path):
    """The README's first command."""
    result = run(tmp_path, "tensorflow", "demo")
    lines = result.stdout.strip().splitlines()
    accuracy = float(lines[-2].rsplit(":", 1)[1].strip(" %"))
    assert "360 held-out images" in lines[-2] and accuracy >= 97
    assert lines[-1] == "Artifact verified: 26 of 26 checks hold."
    assert (tmp_path / "keras-vit-demo/predictions.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_each_part_of_the_demo_on_another_backend(tmp_path, backend):
    """Its steps as commands, with less training."""
    pytest.importorskip(backend, reason="this backend is not installed")
    run(tmp_path, backend, "train", "digits", "--set", "epochs=4")
    run(tmp_path, backend, "export", "runs/digits", "models/digits")
    result = run(tmp_path, backend, "verify", "models/digits")
    told = " ".join(result.stdout.split())  # a table has the width of a terminal
    assert "all 26 checks hold" in told, result.stdout
