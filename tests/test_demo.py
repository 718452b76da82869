import os

import pytest
from test_command import program


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_demo(tmp_path, backend):
    """The README's first command, on each backend that is installed."""
    pytest.importorskip(backend, reason="this backend is not installed")
    # Threads of PyTorch wait for each other by spinning, beside other tests for long.
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
    result = program("demo", cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.strip().splitlines()
    accuracy = float(lines[-2].rsplit(":", 1)[1].strip(" %"))
    assert "360 held-out images" in lines[-2] and accuracy >= 97
    assert lines[-1] == "Artifact verified: 26 of 26 checks hold."
    assert (tmp_path / "keras-vit-demo/predictions.png").stat().st_size > 10_000
