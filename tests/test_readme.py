"""The landing page: it is short, and points to what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.first


def test_the_readme_is_a_page_to_land_on():
    assert len(TEXT.splitlines()) <= 260
    assert 'pip install -e ".[demo]" && keras-vit demo' in TEXT
    assert 'pip install -e ".[test]" && pytest' in TEXT


def test_the_readme_points_to_what_exists():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)
    assert len(links) > 20
    for name in links:
        assert (ROOT / name).exists(), name


def test_its_figures_are_those_of_the_benchmarks():
    figures = (ROOT / "benchmarks/README.md").read_text()
    speed = TEXT[TEXT.index("## Speed") : TEXT.index("## More")]
    rows = [x.rstrip("| ") for x in speed.splitlines() if re.match(r"\| \w.*\d", x)]
    assert len(rows) == 4
    for row in rows:
        assert row in figures, row
