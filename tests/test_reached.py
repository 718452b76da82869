"""That the longer recipes learn; `benchmarks/segmentation.py` shows how far."""

import os

import pytest
from test_command import program


@pytest.mark.slow
def test_digits_segmentation_learns_and_keeps_it_on_another_canvas(tmp_path):
    """8 of its 20 epochs, then a canvas that it never saw."""
    options = {"cwd": tmp_path, "env": os.environ}
    result = program("train", "digits_segmentation", "--set", "epochs=8", **options)
    assert result.returncode == 0, result.stdout + result.stderr
    for size, least in ((64, 0.6), (96, 0.6)):
        data = f"digit_scenes:{size}"
        arguments = ("evaluate", "runs/digits_segmentation", "--data", data)
        result = program(*arguments, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        score = result.stdout.rsplit("mean IoU ", 1)[1].split(",")[0]
        assert float(score) > least
