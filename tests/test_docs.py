"""The pages of the documentation: they build, and what they show is so."""

import html.parser
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit import cpvt, lvvit, pcpvt, vit

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
}
FAMILIES = {"ViT": vit, "CPVT": cpvt, "LVViT": lvvit, "PCPVT": pcpvt}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class Page(html.parser.HTMLParser):
    """What a page of the site points to, and the anchors that it has."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built so that a link or an anchor which is not there is an error.

    Not with `--quiet`, under which `--strict` sees no warnings.
    """
    directory = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "mkdocs", "build", "--strict")
    result = subprocess.run(
        (*command, "-d", directory),
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


@pytest.mark.first
def test_every_link_and_picture_of_the_site_is_there(site):
    """In the HTML itself: also those that a notebook or a docstring makes."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 30
    count = 0
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc:
                continue
            place = urllib.parse.unquote(url.path)
            base = site if place.startswith("/") else path.parent
            target = (base / place.lstrip("/")).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if url.fragment and target in pages:
                known = pages[target].anchors | {"__skip", "__comments"}
                anchor = urllib.parse.unquote(url.fragment)
                assert anchor in known, f"{path.relative_to(site)}: {link}"
            count += 1
    assert count > 1000


@pytest.mark.first
def test_the_site_fetches_nothing_but_what_draws_formulas(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    fetched = {
        address
        for text in pages.values()
        for tag in re.findall(r"<(?:script|link|img)\b[^>]*>", text)
        for address in re.findall(r'(?:src|href)="(https?://[^"]+)"', tag)
    }
    assert len(fetched) == 3
    assert all("/katex@" in x for x in fetched)


@pytest.mark.first
def test_the_site_describes_every_command_and_name(site):
    from keras_vit.__main__ import app

    page = (site / "reference/command-line/index.html").read_text()
    for name in commands(app):
        assert f'id="keras-vit-{name}"' in page
    text = "".join(x.read_text() for x in (site / "reference").rglob("*.html"))
    anchors = {x.rpartition(".")[2] for x in Page(text).anchors if "." in x}
    import export
    import training

    for package in (keras_vit, training, export):
        names = set(package.__all__) - {"RECIPES"}  # which the zoo has
        assert names - anchors == set(), package.__name__


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in PAGES if blocks(PAGES[x], "python")])
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(PAGES[name], "python"):
        exec(block, names)
    if name == "README.md":
        assert names["logits"].shape == (1, 1000)
    if name == "docs/guides/models.md":
        assert len(names["maps"].outputs) == 4
    if name == "docs/guides/train.md":
        assert (tmp_path / "runs/mine/last.keras").is_file()
    if name == "docs/guides/checkpoints.md":
        assert (tmp_path / "tiny/config.json").is_file()


@pytest.mark.first
def test_python_that_is_not_run_is_python():
    shown = [x for text in PAGES.values() for x in blocks(text, "py")]
    assert len(shown) >= 3
    for block in shown:
        compile(block, "py", "exec")
    assert sum(len(blocks(text, "python")) for text in PAGES.values()) >= 9


def commands(app):
    import typer

    return typer.main.get_command(app).commands


def command_lines(text):
    """The arguments of each `keras-vit` in the `bash` blocks of a page."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "keras-vit" in words:
                words = words[words.index("keras-vit") + 1 :]
                ends = [i for i, x in enumerate(words) if x in ("&&", "&", "|", ";")]
                yield words[: min(ends, default=len(words))]


@pytest.mark.first
def test_command_lines_are_as_the_program_takes_them():
    """Each is parsed, with its values; nothing is run."""
    from keras_vit.__main__ import app

    known, count = commands(app), 0
    for name, text in PAGES.items():
        for words in command_lines(text):
            assert words[0] in known, f"{name}: {words}"
            try:
                known[words[0]].make_context(words[0], words[1:])
            except Exception as error:
                pytest.fail(f"{name}: keras-vit {' '.join(words)}: {error}")
            count += 1
    assert count > 40


@pytest.mark.first
def test_commands_in_sentences_have_their_options():
    from keras_vit.__main__ import app

    known, count = commands(app), 0
    for name, text in PAGES.items():
        for line in re.findall(r"`(keras-vit [^`]+)`", text):
            words = line.replace("\n", " ").split()[1:]
            if words[0] in ("--help", "COMMAND"):
                continue
            assert words[0] in known, f"{name}: {line}"
            options = {x for p in known[words[0]].params for x in p.opts}
            given = {x for x in words if x.startswith("--")} - {"--help"}
            assert given <= options, f"{name}: {line}"
            count += 1
    assert count > 10


@pytest.mark.first
def test_pages_name_tests_that_exist():
    text = " ".join(PAGES.values()).replace("\n", " ")
    asked = [
        x for x in re.findall(r"`pytest ([^`]+)`", text) if "-k" in x or ".py" in x
    ]
    assert len(asked) > 20
    for command in asked:
        files = re.findall(r"tests/\w+\.py", command)
        paths = [ROOT / x for x in files] or (ROOT / "tests").glob("test_*.py")
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


def rows(name, start):
    """Cells of the rows of a page whose first cell matches."""
    lines = [x for x in PAGES[name].splitlines() if re.match(rf"\| {start}", x)]
    return [[x.strip() for x in line.strip("|").split("|")] for line in lines]


@pytest.mark.first
@pytest.mark.slow
def test_the_zoo_has_every_row_with_its_parameters():
    told = rows("docs/zoo.md", r"`\w+\(")
    for family, module in FAMILIES.items():
        variants = re.findall(rf'`{family}\("(\w+)"', PAGES["docs/zoo.md"])
        assert set(variants) == set(module.VARIANTS), family
    for call, parameters, size, *_ in told:
        with keras.StatelessScope(initialize_variables=False):  # allocates nothing
            model = eval(call.strip("`"), vars(keras_vit).copy())
            count = sum(np.prod(v.shape) for v in model.trainable_variables)
        keras.utils.clear_session()  # or Keras would initialise them after all
        assert f"{count:,}" == parameters, call
        assert str(model.input_shape[1] or "any") == size, call


@pytest.mark.first
def test_the_zoo_has_every_recipe_with_its_result():
    from training.recipe_tables import overview

    told = [[x.strip("`") for x in row] for row in rows("docs/zoo.md", r"`\w+` ")]
    assert told == [list(row) for row in overview()]
