"""The commands on the versions of an exported model."""

import os

import pytest
from test_command import program, run
from test_versions import ROOT, add, names, pin


@pytest.fixture
def folder(tmp_path):
    """Three versions, of plain files."""
    for text in "abc":
        add(tmp_path / "m", text=text)
    return tmp_path / "m"


def rows(out):
    lines = [x.split("│") for x in out.splitlines() if x.startswith("│")]
    return [[x.strip() for x in line[1:-1]] for line in lines]


def test_versions_are_listed_with_what_is_served(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "versions", folder)
    assert code == 0
    table = [[row[0], *row[2:]] for row in rows(out)]
    others = ["0.0 MB", "tiny", "yes", ""]
    assert table == [["3", *others[:-1], "yes"], ["2", *others], ["1", *others]]
    (folder / "3/assets.extra/report.json").write_text('{"ok": false}')
    (folder / "2/assets.extra/report.json").unlink()
    (folder / "02").mkdir()
    policy = "model_version_policy { specific { versions: 1 } } "
    pin(folder, policy + 'version_labels { key: "stable" value: 1 }')
    code, out, _ = run(capsys, monkeypatch, "versions", folder)
    told = {row[0]: row[4:] for row in rows(out)}
    assert told == {
        "3": ["no", ""],
        "2": ["no report", ""],
        "1": ["yes", "yes, stable"],
    }
    assert "02 and 2 are one number: a server loads 2 as 2 and ignores the rest" in out


def test_a_rollback_is_told_and_listed(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "rollback", folder)
    assert code == 0 and len(out.splitlines()) == 1
    assert f"Published: {folder / '4'}, a copy of version 2, instead of 3." in out
    _, out, _ = run(capsys, monkeypatch, "versions", folder)
    assert [rows(out)[0][i] for i in (0, 3, 5)] == ["4", "tiny (copy of 2)", "yes"]
    _, out, _ = run(capsys, monkeypatch, "rollback", folder, "--to", "3")
    assert "a copy of version 3, instead of 4." in out


def test_a_rollback_that_a_pin_hides_says_so(folder, capsys, monkeypatch):
    pin(folder, "model_version_policy { specific { versions: 3 } }")
    code, out, _ = run(capsys, monkeypatch, "rollback", folder)
    assert code == 0 and "But bundle/models.config pins 3: a server" in out


def test_prune_says_what_went_and_what_stays(folder, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "prune", folder, "--keep", "1")
    assert (code, out) == (0, "Deleted: 1, 2. There are: 3.\n")
    _, out, _ = run(capsys, monkeypatch, "prune", folder)
    assert out == "Deleted: none. There are: 3.\n"


def test_upload_takes_the_newest_version(folder, tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "upload", folder, tmp_path / "there")
    assert code == 0 and out == f"Uploaded: {tmp_path / 'there/3'}\n"
    run(capsys, monkeypatch, "upload", folder / "1", tmp_path / "there")
    assert names(tmp_path / "there") == ["1", "3"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "versions nowhere",
            "nowhere must be a folder of versions: it has no numbered",
        ),
        (
            "rollback m --to 9",
            "goes to an older version than the newest; m has 1, 2, 3",
        ),
        ("upload m none://bucket/m", "Protocol not known: none"),
    ],
)
def test_a_mistake_is_one_sentence(folder, words, sentence, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    code, _, err = run(capsys, monkeypatch, *words.split())
    assert code == 1 and sentence in err and len(err.strip().splitlines()) == 1


def test_no_command_on_versions_waits_for_tensorflow(folder, tmp_path):
    """Keras and TensorFlow cannot be imported here at all."""
    for name in ("keras", "tensorflow"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not now')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    for words in (
        ("versions", folder),
        ("rollback", folder),
        ("prune", folder, "--keep", "1"),
        ("upload", folder, tmp_path / "there"),
    ):
        done = program(*map(str, words), env=environment)
        assert done.returncode == 0, done.stderr
    assert names(folder) == ["4"]
