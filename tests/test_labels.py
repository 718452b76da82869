import dataclasses
import json

import numpy as np
import pytest
import tensorflow as tf
from test_data import write_images

from keras_vit.model_file import replacing
from training import load_data, open_labels, with_label_maps
from training.labels import LabelStore, begin, finish

COUNTS = {"cat": 12, "dog": 10}  # 20 to train on, 2 held out
CLASSES = ("cat", "dog")


def maps(shard, rows):
    """Values and classes that tell where they belong."""
    rng = np.random.default_rng(shard)
    shape = (len(rows), 2, 3, 2)
    return rng.uniform(0, 1, shape).astype("float16"), rng.integers(
        0, 2, shape, "int32"
    )


@pytest.fixture
def data(tmp_path):
    return load_data(f"folder:{write_images(tmp_path / 'images', COUNTS)}")


@pytest.fixture
def plan(tmp_path, data):
    return LabelStore(
        folder=tmp_path / "labels",
        data="folder:images",
        data_fingerprint=data.fingerprint,
        images=20,
        labels=CLASSES,
        teacher="teacher.keras",
        teacher_sha256="ab" * 32,
        backend="tensorflow",
        image_size=(16, 24),
        normalization=None,
        batch_size=4,
        top=2,
        map_size=(2, 3),
        shard_size=6,
    )


def fill(plan, order=(0, 1, 2, 3)):
    store = begin(plan)
    for shard in order:
        store.write(shard, *maps(shard, store.rows(shard)))
    return finish(store, list(order))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path, place=300):
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)


def test_a_store_streams_what_was_written_in_order(plan):
    fill(plan)
    store = open_labels(plan.folder)
    assert [len(store.rows(i)) for i in range(4)] == [6, 6, 6, 2]
    stream = store.stream()
    assert stream.element_spec == (
        tf.TensorSpec((2, 3, 2), tf.float16),
        tf.TensorSpec((2, 3, 2), tf.int32),
    )
    assert len(stream) == 20
    for _ in range(2):  # epochs
        found = list(stream.as_numpy_iterator())
        written = [maps(i, store.rows(i)) for i in range(4)]
        for part in range(2):
            expected = np.concatenate([x[part] for x in written])
            np.testing.assert_array_equal(np.stack([x[part] for x in found]), expected)
            assert found[0][part].dtype == expected.dtype


def test_the_order_of_writing_leaves_no_trace(plan):
    other = dataclasses.replace(plan, folder=plan.folder.with_name("other"))
    assert fill(plan).fingerprint == fill(other, (3, 0, 2, 1)).fingerprint
    assert content(plan.folder) == content(other.folder)
    names = {f"train-{i:05d}-of-00004.npz" for i in range(4)} | {"labels.json"}
    assert set(content(plan.folder)) == names
    assert str(plan.folder.parent) not in (plan.folder / "labels.json").read_text()


def test_a_store_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder of label maps .*nowhere"):
        open_labels(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"of label maps, with labels\.json\."):
        open_labels(tmp_path)


def test_a_store_that_is_not_finished_says_how_much_is_missing(plan):
    store = begin(plan)
    store.write(1, *maps(1, store.rows(1)))
    sentence = r"3 of 4 shards are missing\. Run annotate again, as before"
    with pytest.raises(ValueError, match=sentence):
        open_labels(plan.folder)
    for shard in (0, 2, 3):
        store.write(shard, *maps(shard, store.rows(shard)))
    finish(store, [0, 1, 2, 3])
    (plan.folder / "train-00002-of-00004.npz").unlink()
    with pytest.raises(ValueError, match="1 of 4 shards are missing"):
        open_labels(plan.folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace('"top"', '"tip"'),
        lambda text: text.replace('"format": 1', '"format": 2'),
        lambda text: "[]",
    ],
)
def test_a_damaged_description_is_told(plan, damage):
    fill(plan)
    path = plan.folder / "labels.json"
    path.write_text(damage(path.read_text()))
    for opened in (lambda: open_labels(plan.folder), lambda: begin(plan)):
        with pytest.raises(ValueError, match=r"labels\.json must describe a store"):
            opened()


@pytest.mark.parametrize(
    "name, value, sentence",
    [
        ("top", 1, "their top is 2, now it is 1. Choose another folder"),
        (
            "teacher_sha256",
            "cd" * 32,
            "their teacher is teacher.keras (abababababab), ",
        ),
        ("data_fingerprint", "ef" * 32, "now it is folder:images (efefefefefef)."),
        ("images", 19, "their images is 20, now it is 19."),
        ("labels", ("a", "b"), "now it is ['a', 'b']."),
        ("image_size", (16, 16), "their image size is [16, 24], now it is [16, 16]."),
        (
            "normalization",
            "imagenet",
            "their normalization is None, now it is imagenet",
        ),
        ("batch_size", 8, "their batch size is 4, now it is 8."),
        ("shard_size", 5, "their shard size is 6, now it is 5."),
        ("backend", "jax", "their backend is tensorflow, now it is jax."),
        ("map_size", (3, 3), "their map size is [2, 3], now it is [3, 3]."),
    ],
)
def test_another_plan_is_refused_before_and_after_the_end(plan, name, value, sentence):
    other = dataclasses.replace(plan, **{name: value})
    begin(plan)
    before = content(plan.folder)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            begin(other)
        assert sentence in str(error.value) and "holds other label maps" in str(
            error.value
        )
        assert content(plan.folder) == before
        fill(plan)
        before = content(plan.folder)


def test_another_name_of_the_same_is_the_same(plan):
    fill(plan)
    renamed = dataclasses.replace(plan, data="folder:photos", teacher="best.keras")
    assert begin(renamed).data == "folder:images"


def test_a_folder_of_something_else_is_left_alone(plan):
    plan.folder.mkdir()
    (plan.folder / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"a new folder .*, got one with letter\.txt"):
        begin(plan)
    assert set(content(plan.folder)) == {"letter.txt"}


def test_every_flipped_bit_is_found_and_named(plan):
    store = fill(plan)
    store.check()
    path = store.shards[2]
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 12).astype(int):
        flip(path, place)
        with pytest.raises(ValueError, match=r"missing: train-00002-of-00004\.npz\. "):
            store.check()
        path.write_bytes(whole)
    store.check()


def test_all_damaged_and_missing_shards_are_named(plan):
    store = fill(plan)
    flip(store.shards[0])
    store.shards[3].unlink()
    sentence = r"train-00000-of-00004\.npz, train-00003-of-00004\.npz\. Delete what is"
    with pytest.raises(ValueError, match=sentence):
        store.check()


@pytest.mark.parametrize("damage", [flip, lambda path: path.unlink()])
def test_a_damaged_shard_is_named_when_it_is_read(plan, damage):
    store = fill(plan)
    damage(store.shards[1])
    stream = store.stream().as_numpy_iterator()
    for _ in range(6):
        next(stream)
    with pytest.raises(tf.errors.OpError, match=r"missing: train-00001-of-00004\.npz"):
        next(stream)


def test_the_end_refuses_a_shard_that_is_not_whole(plan):
    store = begin(plan)
    for shard in range(4):
        store.write(shard, *maps(shard, store.rows(shard)))
    whole = store.shards[1].read_bytes()
    store.write(1, *maps(1, range(5)))
    too_few = store.shards[1].read_bytes()
    for content in (too_few, whole[:500], whole[:700] + b"?" + whole[701:], b""):
        store.shards[1].write_bytes(content)
        with pytest.raises(ValueError, match=r"missing: train-00001-of-00004\.npz"):
            finish(store, [0, 1, 2, 3])
    store.shards[1].write_bytes(whole)
    finish(store, [0, 1, 2, 3]).check()


def test_a_repair_does_not_bless_what_else_is_damaged(plan):
    store = fill(plan)
    before = content(plan.folder)
    flip(store.shards[3])
    store.write(0, *maps(0, store.rows(0)))
    finish(store, [0])
    with pytest.raises(ValueError, match=r"missing: train-00003-of-00004\.npz\. "):
        store.check()
    assert content(plan.folder)["labels.json"] == before["labels.json"]


def test_a_repair_that_came_out_different_is_told(plan):
    before = fill(plan)
    before.write(2, *maps(7, before.rows(2)))
    with pytest.warns(
        UserWarning, match=r"train-00002-of-00004\.npz came out different"
    ):
        after = finish(before, [2])
    after.check()
    assert after.fingerprint != before.fingerprint
    assert open_labels(plan.folder) == after


def test_the_end_clears_away_what_killed_processes_left(plan):
    fill(plan)
    before = content(plan.folder)
    for name in (".train-00001-of-00004.99.npz", ".plan.99.json", ".labels.99.json"):
        (plan.folder / name).write_bytes(b"half")
    (plan.folder / "plan.json").write_bytes(before["labels.json"])
    (plan.folder / ".keep").write_bytes(b"")
    finish(begin(plan), [])
    assert content(plan.folder) == {**before, ".keep": b""}


def test_data_with_label_maps_are_other_data(plan, data):
    store = fill(plan)
    labelled = with_label_maps(data, plan.folder)
    assert labelled.fingerprint not in (data.fingerprint, store.fingerprint)
    assert dataclasses.replace(labelled, label_maps=None) == dataclasses.replace(
        data, fingerprint=labelled.fingerprint
    )
    values = [x for x, _ in labelled.label_maps().as_numpy_iterator()]
    np.testing.assert_array_equal(np.stack(values[:6]), maps(0, range(6))[0])
    store.write(2, *maps(7, store.rows(2)))
    with pytest.warns(UserWarning):
        finish(store, [2])
    other = with_label_maps(data, plan.folder)
    assert other.fingerprint not in (data.fingerprint, labelled.fingerprint)


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "ab" * 32},
        {"labels": ("dog", "cat")},
        {"sizes": {"train": 19, "validation": 2}},
    ],
)
def test_label_maps_of_other_data_are_refused(plan, data, change):
    fill(plan)
    other = dataclasses.replace(data, name="others", **change)
    sentence = r"of 'folder:images' \(20 images, 2 classes, .* not fit 'others' \("
    with pytest.raises(ValueError, match=sentence):
        with_label_maps(other, plan.folder)


def test_label_maps_that_are_not_there_are_refused(plan, data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of label maps"):
        with_label_maps(data, tmp_path / "nowhere")
    begin(plan)
    with pytest.raises(ValueError, match="4 of 4 shards are missing"):
        with_label_maps(data, plan.folder)


def test_the_description_says_what_it_is(plan):
    store = fill(plan)
    description = json.loads((plan.folder / "labels.json").read_text())
    assert description["format"] == 1 and len(description["checksums"]) == 4
    assert store.summary() == (
        "label maps of 20 images of folder:images, 2 x 3 places, 2 of 2 classes each, "
        "by teacher.keras"
    )


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            temporary.write_text(text)
        assert path.read_text() == text
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert content(tmp_path) == {"file.txt": b"new"}
