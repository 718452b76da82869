"""What the README shows, run."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 6
    names = {"images": np.zeros((1, 224, 224, 3), "float32"), "keras": keras}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (1, 1000)
    assert len(names["maps"].outputs) == 4
    assert (tmp_path / "runs/mine/last.keras").is_file()


def test_the_readme_points_to_what_exists():
    text = README.read_text()
    for name in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (README.parent / name).exists(), name
    for file in re.findall(r"pytest (tests/\w+\.py)", text):
        assert (README.parent / file).exists(), file
    assert 'pip install -e ".[demo]" && keras-vit demo' in text
    assert 'pip install -e ".[test]" && pytest' in text
