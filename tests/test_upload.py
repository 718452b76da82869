"""Uploads to an object store in memory."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from test_versions import FILES, add, names

from export.upload import upload
from export.versions import problem


class Watched(MemoryFileSystem):
    """An object store in memory that keeps the order in which it was written."""

    store, pseudo_dirs, log = {}, [""], []
    breaks_at = None

    def cp_file(self, path1, path2, **options):
        self.note("copy", path2)
        return super().cp_file(path1, path2, **options)

    def put_file(self, lpath, rpath, **options):
        self.note("put", rpath)
        return super().put_file(lpath, rpath, **options)

    def note(self, what, path):
        if path.endswith(str(Watched.breaks_at)):
            raise ConnectionError("the line is cut")
        Watched.log.append((what, path.removeprefix("/m/digits/")))


@pytest.fixture
def store(monkeypatch):
    fsspec.register_implementation("memory", Watched, clobber=True)
    monkeypatch.setattr(Watched, "store", {})
    monkeypatch.setattr(Watched, "log", [])
    monkeypatch.setattr(Watched, "breaks_at", None)
    yield fsspec.filesystem("memory")
    fsspec.register_implementation("memory", MemoryFileSystem, clobber=True)


URL = "memory://m/digits"


def stored(store):
    return sorted(x.removeprefix("/m/digits/") for x in Watched.store)


def everything(prefix):
    return sorted(f"{prefix}/{x}" for x in (*FILES, "assets.extra/SHA256SUMS"))


def test_the_file_that_a_server_looks_for_is_uploaded_last(tmp_path, store):
    version = add(tmp_path)
    assert upload(version, URL, progress=False) == f"{URL}/1"
    assert stored(store) == everything("1")
    numbered = [path for _, path in Watched.log if path.startswith("1/")]
    assert numbered[-1] == "1/saved_model.pb" and len(numbered) == len(FILES) + 1
    first = Watched.log.index(("copy", numbered[0]))
    sent = [path for what, path in Watched.log[:first] if what == "put"]
    assert sorted(sent) == everything(".uploading-1")  # all of it is in the store then
    assert store.cat("/m/digits/1/saved_model.pb") == b"graph"


def test_an_upload_that_broke_goes_on_and_sends_nothing_twice(
    tmp_path, store, monkeypatch
):
    version = add(tmp_path)
    monkeypatch.setattr(Watched, "breaks_at", "variables.index")
    with pytest.raises(ConnectionError):
        upload(version, URL, progress=False)
    assert not [path for path in stored(store) if path.startswith("1/")]
    before = [path for what, path in Watched.log if what == "put"]
    store.pipe("/m/digits/.uploading-1/assets.extra/report.json", b'{"ok": TRUE}')
    monkeypatch.setattr(Watched, "breaks_at", None)
    Watched.log.clear()
    upload(version, URL, progress=False)
    after = [path for what, path in Watched.log if what == "put"]
    changed = ".uploading-1/assets.extra/report.json"  # the same size, other bytes
    assert set(before) & set(after) == {changed}
    assert stored(store) == everything("1")


def test_a_version_in_a_store_is_never_changed(tmp_path, store):
    version = add(tmp_path)
    upload(version, URL, progress=False)
    Watched.log.clear()
    assert upload(version, URL, progress=False) == f"{URL}/1"
    assert Watched.log == []
    other = add(tmp_path / "other", text="x")
    with pytest.raises(FileExistsError, match=r"/1 exists, and its .*SUMS is not"):
        upload(other, URL, progress=False)
    assert store.cat("/m/digits/1/saved_model.pb") == b"graph"


def test_bytes_that_got_lost_on_the_way_are_noticed(tmp_path, store, monkeypatch):
    version = add(tmp_path)
    cut = lambda self, lpath, rpath, **_: self.pipe(rpath, b"cut")  # noqa: E731
    monkeypatch.setattr(Watched, "put_file", cut)
    with pytest.raises(OSError, match=r"must have the \d+ bytes of .*it has 3; upload"):
        upload(version, URL, progress=False)
    assert not [path for path in stored(store) if path.startswith("1/")]


def test_what_is_no_whole_version_is_not_uploaded(tmp_path, store):
    version = add(tmp_path)
    (version / "variables/variables.index").unlink()
    with pytest.raises(
        ValueError, match=r"version directory: variables/variables.index"
    ):
        upload(version, URL, progress=False)
    with pytest.raises(ValueError, match="its name is no number"):
        upload(tmp_path, URL, progress=False)
    assert stored(store) == []


def test_a_folder_is_published_to_by_a_rename(tmp_path):
    version = add(tmp_path / "here", 3)
    there = tmp_path / "there"
    assert upload(version, there.as_uri(), progress=False) == str(there / "3")
    assert names(there) == ["3"] and problem(there / "3") is None
    with pytest.raises(FileExistsError, match="has 3 already"):
        upload(version, str(there), progress=False)
