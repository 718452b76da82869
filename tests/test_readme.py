"""What the README shows, run."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 9
    names = {"images": np.zeros((1, 224, 224, 3), "float32"), "keras": keras}
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (1, 1000)
    assert len(names["maps"].outputs) == 4
    assert (tmp_path / "runs/mine/last.keras").is_file()
    assert (tmp_path / "tiny/config.json").is_file()


def test_the_readme_points_to_what_exists():
    text = README.read_text()
    for name in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (README.parent / name).exists(), name
    assert 'pip install -e ".[demo]" && keras-vit demo' in text
    assert 'pip install -e ".[test]" && pytest' in text


def test_the_readme_names_tests_that_exist():
    text = README.read_text().replace("\n", " ")
    commands = [
        x for x in re.findall(r"`pytest ([^`]+)`", text) if "-k" in x or ".py" in x
    ]
    assert len(commands) > 20
    for command in commands:
        files = re.findall(r"tests/\w+\.py", command)
        paths = [README.parent / x for x in files] or TESTS.glob("test_*.py")
        sources = {path.stem: path.read_text() for path in paths}
        found = re.search(r'-k (?:"([^"]+)"|(\S+))', command)
        for word in (found[1] or found[2]).split(" or ") if found else ():
            tests = [
                name
                for stem, source in sources.items()
                for name in re.findall(r"def (test_\w+)", source)
                if word in f"{stem}::{name}"
            ]
            assert tests, command
