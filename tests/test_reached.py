"""What recipes say that they reach."""

import os

import pytest
from test_command import program


@pytest.mark.slow
def test_digits_segmentation_reaches_what_it_says(tmp_path):
    """Its whole training, then a canvas that it never saw."""
    options = {"cwd": tmp_path, "env": os.environ}
    result = program("train", "digits_segmentation", **options)
    assert result.returncode == 0, result.stdout + result.stderr
    for size, least in ((64, 0.75), (96, 0.75)):
        data = f"digit_scenes:{size}"
        arguments = ("evaluate", "runs/digits_segmentation", "--data", data)
        result = program(*arguments, **options)
        assert result.returncode == 0, result.stdout + result.stderr
        score = result.stdout.rsplit("mean IoU ", 1)[1].split(",")[0]
        assert float(score) > least
