import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from export import versions as module
from export.versions import (
    describe,
    duplicates,
    parse_number,
    problem,
    prune,
    publish,
    rollback,
    served,
    staging,
    versions,
)

ROOT = Path(__file__).parent.parent
FILES = {
    "saved_model.pb": b"graph",
    "variables/variables.index": b"index",
    "variables/variables.data-00000-of-00001": b"weights" * 1000,
    "assets.extra/manifest.json": b'{"model": "tiny"}',
    "assets.extra/report.json": b'{"ok": true}',
}


def write(folder, text=""):
    """A version of plain files: publishing does not care what is in them."""
    for name, data in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + text.encode() if name == "saved_model.pb" else data)
    lines = [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in FILES
    ]
    (folder / "assets.extra/SHA256SUMS").write_text("".join(lines))


def add(folder, version=None, text=""):
    with staging(folder) as target:
        write(target, text)
        return publish(target, folder, version)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def content(path):
    return (path / "saved_model.pb").read_bytes()


@pytest.mark.parametrize(
    ("name", "number"),
    [("7", 7), ("007", 7), ("+7", 7), (" 7\t", 7), ("-1", -1), (str(2**63 - 1), None)],
)
def test_a_number_is_what_the_server_reads(name, number):
    assert parse_number(name) == (2**63 - 1 if number is None else number)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "7a",
        ".7",
        "7.0",
        "1_0",
        "\N{ARABIC-INDIC DIGIT SEVEN}",
        "0x7",
        "7 7",
        "--7",
        str(2**63),
    ],
)
def test_what_the_server_reads_no_number_in_is_no_version(name):
    assert parse_number(name) is None


def test_versions_are_in_order_and_two_names_of_a_number_are_told(tmp_path):
    for name in ("10", "2", "01", "1", "bundle", ".exporting-x", "3.tmp"):
        (tmp_path / name).mkdir()
    found = [(x.number, x.path.name) for x in versions(tmp_path)]
    assert found == [(1, "1"), (2, "2"), (10, "10")]
    assert duplicates(tmp_path) == {1: ["01", "1"]}
    assert versions(tmp_path / "nowhere") == []


def test_versions_follow_each_other(tmp_path):
    assert add(tmp_path / "m").name == "1"
    assert add(tmp_path / "m", 7).name == "7"
    assert add(tmp_path / "m").name == "8"
    assert names(tmp_path / "m") == ["1", "7", "8"]


@pytest.mark.parametrize("name", ["5", "005"])
@pytest.mark.parametrize("kind", ["whole", "empty folder", "file"])
def test_an_existing_version_is_never_changed(tmp_path, name, kind):
    """A rename alone would replace an empty folder."""
    taken = tmp_path / name
    taken.write_text("") if kind == "file" else taken.mkdir()
    if kind == "whole":
        write(taken, "old")
    with pytest.raises(FileExistsError, match="has 5 already; it has 5"):
        add(tmp_path, 5)
    assert names(tmp_path) == [name]
    assert kind != "whole" or content(taken) == b"graphold"
    assert add(tmp_path).name == "6"


EXPORTER = """
import sys, time
from pathlib import Path
from test_versions import FILES, write
from export.versions import prune, publish, rollback, staging
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[2])):
    with staging(folder) as target:
        write(target)
        print(publish(target, folder).name, flush=True)
    if sys.argv[3:] and i % 3 == 2:
        rollback(folder)
        prune(folder, 3)
"""


def start(folder, number, *everything):
    command = [sys.executable, "-c", EXPORTER, str(folder), str(number), *everything]
    child = subprocess.Popen(
        command,
        cwd=ROOT / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == "ready\n"
    return child


def test_two_at_once_get_two_numbers(tmp_path):
    children = [start(tmp_path, 30) for _ in range(2)]
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    numbers = [child.communicate()[0].split() for child in children]
    assert sorted(int(x) for own in numbers for x in own) == list(range(1, 61))
    assert all(problem(x.path) is None for x in versions(tmp_path))
    assert len(names(tmp_path)) == 60


class Poller(threading.Thread):
    """Looks every millisecond, as a server every second; keeps what is not whole."""

    def __init__(self, folder):
        super().__init__(daemon=True)
        self.folder, self.done, self.broken, self.seen = folder, False, [], set()

    def run(self):
        while not self.done:
            for name in os.listdir(self.folder):
                if parse_number(name) is not None and name not in self.seen:
                    self.seen.add(name)
                    wrong = problem(self.folder / name)
                    if wrong and (self.folder / name).exists():  # not pruned
                        self.broken.append((name, wrong))
            time.sleep(0.001)


def kill_at_random(folder, times, seed):
    draw = random.Random(seed)
    poller = Poller(folder)
    poller.start()
    left = 0
    for _ in range(times):
        child = start(folder, 10_000, "roll back and prune")
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()  # one is published
        time.sleep(draw.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.wait()
        left += len(list(folder.glob(".*")))
        assert [x.path for x in versions(folder) if problem(x.path)] == []
    poller.done = True
    poller.join()
    assert poller.broken == []
    assert len(poller.seen) >= times
    add(folder)
    assert not list(folder.glob(".*"))  # what the dead left
    return left


def test_a_kill_while_publishing_or_pruning_shows_no_half_version(tmp_path):
    kill_at_random(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_many_kills_at_random_moments_show_no_half_version(tmp_path):
    assert kill_at_random(tmp_path, 25, seed=1) > 0


def test_what_a_dead_export_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    dead = tmp_path / ".exporting-dead"
    write(dead / "version")
    (tmp_path / ".pruned-dead").mkdir()
    with staging(tmp_path) as target:
        write(target)
        assert not dead.exists() and not (tmp_path / ".pruned-dead").exists()
        assert add(tmp_path).name == "1"  # by another, which sweeps too
        assert publish(target, tmp_path).name == "2"
    assert names(tmp_path) == ["1", "2"]


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="halfway"), staging(tmp_path) as target:
        write(target)
        raise RuntimeError("halfway")
    assert names(tmp_path) == []


# --- back ---


def test_a_rollback_is_a_newest_copy_of_the_version_before(tmp_path):
    for text in "abc":
        add(tmp_path, text=text)
    path = rollback(tmp_path)
    assert (path.name, content(path)) == ("4", b"graphb")
    assert content(tmp_path / "3") == b"graphc"
    record = json.loads((path / "assets.extra/rollback.json").read_text())
    told = [record[x] for x in ("copy_of", "original", "instead_of")]
    assert told == [2, 2, 3]
    assert not (tmp_path / "2/assets.extra/rollback.json").exists()
    data = "variables/variables.data-00000-of-00001"
    assert (path / data).samefile(tmp_path / "2" / data)  # no second copy of weights


def test_a_second_rollback_goes_one_further(tmp_path):
    for text in "abc":
        add(tmp_path, text=text)
    assert [content(rollback(tmp_path)) for _ in range(2)] == [b"graphb", b"grapha"]
    with pytest.raises(
        ValueError, match=r"older than 1 to roll back to; .* has 1, 2, 3"
    ):
        rollback(tmp_path)
    assert content(rollback(tmp_path, to=3)) == b"graphc"
    assert content(rollback(tmp_path)) == b"graphb"  # before the original of 6


def test_checksums_hold_for_the_copy_and_still_for_the_original(tmp_path):
    for text in "ab":
        add(tmp_path, text=text)
    copy = rollback(tmp_path)
    assert problem(tmp_path / "1") is None and problem(copy) is None
    sums = (copy / "assets.extra/SHA256SUMS").read_text().splitlines()
    assert len(sums) == len(FILES) + 1
    (copy / "assets.extra/rollback.json").write_text("{}")
    assert problem(copy).startswith("assets.extra/rollback.json is not what was")


@pytest.mark.parametrize("damage", ["no index", "no weights", "a flipped byte"])
def test_a_damaged_version_is_not_served_again(tmp_path, damage):
    add(tmp_path)
    add(tmp_path)
    variables = tmp_path / "1/variables"
    if damage == "a flipped byte":
        data = bytearray((variables / "variables.index").read_bytes())
        data[2] ^= 1
        (variables / "variables.index").write_bytes(data)
    else:
        name = {"no index": "*.index", "no weights": "*.data-*"}[damage]
        next(variables.glob(name)).unlink()
    with pytest.raises(ValueError, match=r"Version 1 of .* is damaged: variables/"):
        rollback(tmp_path)
    assert names(tmp_path) == ["1", "2"]


@pytest.mark.parametrize("to", [2, 9])
def test_a_rollback_goes_to_an_older_version_only(tmp_path, to):
    add(tmp_path)
    add(tmp_path)
    with pytest.raises(ValueError, match=f"older version than the newest; .*got {to}"):
        rollback(tmp_path, to)


# --- away ---


def pin(folder, policy):
    (folder / "bundle").mkdir()
    (folder / "bundle/models.config").write_text(
        'model_config_list { config { name: "m" base_path: "/models/m" '
        + policy
        + "} }"
    )


def test_prune_keeps_the_newest(tmp_path):
    for _ in range(5):
        add(tmp_path)
    assert prune(tmp_path, keep=2) == [1, 2, 3]
    assert names(tmp_path) == ["4", "5"]
    assert prune(tmp_path) == []
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prune(tmp_path, keep=0)


def test_prune_never_deletes_a_pinned_version(tmp_path):
    for _ in range(4):
        add(tmp_path)
    pin(
        tmp_path,
        "model_version_policy { specific { versions: 1 versions: 3 } } "
        'version_labels { key: "stable" value: 1 }',
    )
    assert served(tmp_path) == {1: ["stable"], 3: []}
    assert prune(tmp_path, keep=1) == [2]
    assert names(tmp_path) == ["1", "3", "4", "bundle"]


@pytest.mark.parametrize(
    ("policy", "numbers"),
    [
        ("", [3]),
        ("model_version_policy { latest { num_versions: 2 } }", [2, 3]),
        ("model_version_policy { all {} }", [1, 2, 3]),
    ],
)
def test_what_is_served_is_what_the_configuration_says(tmp_path, policy, numbers):
    for _ in range(3):
        add(tmp_path)
    pin(tmp_path, policy)
    assert sorted(served(tmp_path)) == numbers


def test_nothing_is_pruned_by_a_configuration_that_cannot_be_read(tmp_path):
    for _ in range(3):
        add(tmp_path)
    pin(tmp_path, "model_version_policy { specific { version 1 } }")
    with pytest.raises(ValueError, match="must be a ModelServerConfig in text form"):
        prune(tmp_path, keep=1)
    assert names(tmp_path) == ["1", "2", "3", "bundle"]


def test_a_version_loses_its_number_before_its_first_file(tmp_path, monkeypatch):
    """The real deletion, watched."""
    seen = []
    delete = module.shutil.rmtree

    def watch(path, **options):
        seen.append((path.name.startswith(".pruned-"), names(tmp_path)[-1]))
        assert problem(path) is None  # all of it is still there
        delete(path, **options)

    add(tmp_path)
    add(tmp_path)
    monkeypatch.setattr(module.shutil, "rmtree", watch)
    assert prune(tmp_path, keep=1) == [1]
    assert seen == [(True, "2")]


def test_a_link_to_a_version_is_pruned_and_what_it_leads_to_is_left(tmp_path):
    add(tmp_path / "elsewhere")
    models = tmp_path / "models"
    add(models, 2)
    (models / "1").symlink_to(tmp_path / "elsewhere/1")
    assert prune(models, keep=1) == [1] and names(models) == ["2"]
    assert problem(tmp_path / "elsewhere/1") is None


def test_a_version_is_described_by_its_own_files(tmp_path):
    add(tmp_path)
    add(tmp_path)
    rollback(tmp_path)
    told = describe(versions(tmp_path)[-1])
    assert (told["model"], told["verified"], told["copy_of"]) == ("tiny", True, 1)
    assert told["bytes"] > 7000
