import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_data import few_scenes, write_images
from test_dense import ask, bright_or_dark, network, pictures, random_weights
from test_labels import content, flip

from training import annotate, load_data, open_labels, with_label_maps
from training.dense import dense_classifier

ROOT = Path(__file__).parent.parent
OPTIONS = {"batch_size": 4, "shard_size": 6}
PAUSE = 0.4  # seconds that a slow child takes for half a file


SLOW_CHILD = """
import sys, time
import numpy
from training import annotate, load_data

savez = numpy.savez

def slow(path, **arrays):
    savez(path, **arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    print(path.name, flush=True)
    time.sleep({pause})
    path.write_bytes(whole)

numpy.savez = slow
teacher, data, labels = sys.stdin.readline().strip().split(",")
annotate(teacher, load_data(data), labels, **{options})
"""


class SlowChild:
    """A process that annotates and leaves each file half written for a while.

    It imports what it needs as soon as it is made, by the side of other tests.
    """

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLOW_CHILD.format(pause=PAUSE, options=OPTIONS)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, folder, data, labels):
        words = (str(folder / "teacher.keras"), data.name, str(labels))
        self.process.stdin.write(",".join(words) + "\n")
        self.process.stdin.flush()

    def kill(self, shards, seconds):
        """When it has begun to write so many shards, and a bit later."""
        for _ in range(shards):
            assert self.process.stdout.readline()
        time.sleep(seconds)
        self.end()
        assert self.process.returncode == -signal.SIGKILL

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def children():
    started = [SlowChild(), SlowChild()]
    yield started
    for child in started:
        child.end()


@pytest.fixture(scope="module")
def work(tmp_path_factory, children):
    """A folder of 26 training images, a teacher, and its label maps in 5 shards."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("annotator")
    data = load_data(f"folder:{write_images(folder / 'images', {'a': 14, 'b': 14})}")
    random_weights(network(classes=2)).save(folder / "teacher.keras")
    annotate(folder / "teacher.keras", data, folder / "labels", **OPTIONS)
    return folder, data


def test_the_maps_are_what_the_teacher_says_of_each_image(work):
    """26 images in shards of 6 and batches of 4: none of these divides another."""
    folder, data = work
    store = open_labels(folder / "labels")
    assert store.images == 26 and [len(store.rows(i)) for i in range(5)] == [6] * 4 + [
        2
    ]
    assert (store.map_size, store.top, store.image_size) == ((4, 6), 2, (32, 48))
    images = [data.decode(*x)[0] for x in data.stream("train")]
    images = [tf.image.resize(x, (32, 48), antialias=True) for x in images]
    images = np.stack(images)
    teacher = keras.saving.load_model(folder / "teacher.keras")
    expected = ask(dense_classifier(teacher), images)
    found = list(store.stream().as_numpy_iterator())
    values = np.stack([x for x, _ in found]).astype("float32")
    classes = np.stack([x for _, x in found])
    assert np.ptp(values) > 0.01 and np.ptp(classes) == 1
    np.testing.assert_allclose(values, -np.sort(-expected), atol=1e-3)
    every = np.take_along_axis(expected, classes, -1)
    np.testing.assert_allclose(every, values, atol=1e-3)
    assert len(list(with_label_maps(data, store.folder).label_maps())) == 26


def test_the_store_tells_neither_when_nor_where_it_was_made(work, tmp_path):
    folder, data = work
    again = annotate(folder / "teacher.keras", data, tmp_path / "again", **OPTIONS)
    expected = content(folder / "labels")
    assert content(tmp_path / "again") == expected
    assert again.data == "folder:images" and again.fingerprint
    assert not any(str(folder).encode() in x for x in expected.values())


def test_a_finished_store_is_returned_as_it_is(work):
    folder, data = work
    before = {x: x.stat().st_mtime_ns for x in (folder / "labels").iterdir()}
    store = annotate(folder / "teacher.keras", data, folder / "labels", **OPTIONS)
    assert store == open_labels(folder / "labels")
    assert {x: x.stat().st_mtime_ns for x in (folder / "labels").iterdir()} == before


def test_five_classes_are_kept_of_many(tmp_path):
    counts = {f"{i:02d}": 10 if i == 0 else 1 for i in range(17)}
    data = load_data(f"folder:{write_images(tmp_path / 'images', counts)}")
    random_weights(network(classes=17)).save(tmp_path / "teacher.keras")
    for top, kept in ((None, 5), (1, 1)):
        folder = tmp_path / f"labels{top}"
        store = annotate(tmp_path / "teacher.keras", data, folder, top=top)
        assert store.top == kept
        for values, classes in store.stream().as_numpy_iterator():
            assert values.shape == (4, 6, kept) and (np.diff(values) <= 0).all()
            assert values.sum(-1).max() < 1 and classes.max() < 17


def test_a_map_covers_the_whole_image_the_right_way_up(tmp_path):
    """The bright corner is outside of what a central crop would see."""
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.zeros((20, 90, 3), "uint8")
            pixels[:10, 75:] = 255  # top right: 2 of 4 rows, 1 of 6 columns
            Image.fromarray(pixels).save(tmp_path / f"images/{name}/{i}.png")
    bright_or_dark().save(tmp_path / "teacher.keras")
    data = load_data(f"folder:{tmp_path / 'images'}")
    store = annotate(tmp_path / "teacher.keras", data, tmp_path / "labels", top=1)
    expected = np.zeros((4, 6))
    expected[:2, 5] = 1
    for values, classes in store.stream().as_numpy_iterator():
        np.testing.assert_array_equal(classes[..., 0], expected)
        assert values.min() > 0.9


def test_pixels_and_size_are_made_as_asked(tmp_path, work):
    _, data = work
    random_weights(network(classes=2, size=(None, None))).save(tmp_path / "any.keras")
    options = {"image_size": (16, 40), "normalization": "imagenet"}
    store = annotate(tmp_path / "any.keras", data, tmp_path / "labels", **options)
    assert store.map_size == (2, 5) and store.image_size == (16, 40)
    assert store.normalization == "imagenet"
    raw = {**options, "normalization": None}
    other = annotate(tmp_path / "any.keras", data, tmp_path / "raw", **raw)
    found = [next(x.stream().as_numpy_iterator())[0] for x in (store, other)]
    assert np.abs(found[0] - found[1]).max() > 0.001


def test_a_deleted_shard_is_made_again_and_alone(work, tmp_path):
    folder, data = work
    labels = tmp_path / "labels"
    labels.mkdir()
    for name, whole in content(folder / "labels").items():
        (labels / name).write_bytes(whole)
    path = labels / "train-00003-of-00005.npz"
    flip(path)
    with pytest.raises(ValueError, match=r"train-00003-of-00005\.npz"):
        open_labels(labels).check()
    with pytest.raises(ValueError, match=r"damaged or missing: train-0000\d-of-00005"):
        annotate(folder / "teacher.keras", data, labels, **OPTIONS)
    path.unlink()
    others = {x: x.stat().st_mtime_ns for x in labels.glob("train-*")}
    annotate(folder / "teacher.keras", data, labels, **OPTIONS)
    assert content(labels) == content(folder / "labels")
    assert {x: x.stat().st_mtime_ns for x in others} == others


def test_beam_writes_the_same_bytes(work, tmp_path):
    folder, data = work
    options = {**OPTIONS, "runner": "DirectRunner"}
    annotate(folder / "teacher.keras", data, tmp_path / "labels", **options)
    assert content(tmp_path / "labels") == content(folder / "labels")
    (tmp_path / "labels/train-00001-of-00005.npz").unlink()
    annotate(folder / "teacher.keras", data, tmp_path / "labels", **options)
    assert content(tmp_path / "labels") == content(folder / "labels")


def test_beam_finds_its_data_by_name(work, tmp_path):
    folder, data = work
    fewer = {"train": data.stream("train").take(9)}
    other = dataclasses.replace(
        data, sizes={"train": 9, "validation": 2}, stream=fewer.__getitem__
    )
    with pytest.raises(ValueError, match="gives others: 26 images, not 9, or other"):
        annotate(
            folder / "teacher.keras", other, tmp_path / "labels", runner="DirectRunner"
        )
    with pytest.raises(ValueError, match="Unexpected pipeline runner: DirectRuner"):
        annotate(
            folder / "teacher.keras", data, tmp_path / "labels", runner="DirectRuner"
        )
    assert not (tmp_path / "labels").exists()


def test_a_runner_without_beam_is_told_what_to_install(work, tmp_path, monkeypatch):
    folder, data = work
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(RuntimeError, match=r'pip install "keras-vit\[beam\]"'):
        annotate(
            folder / "teacher.keras", data, tmp_path / "new", runner="DirectRunner"
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("runner", [None, "DirectRunner"])
def test_a_damaged_image_is_named_and_what_is_done_stays(work, tmp_path, runner):
    folder, _ = work
    images = write_images(tmp_path / "images", {"a": 14, "b": 14})
    whole = (images / "b/001.png").read_bytes()
    (images / "b/001.png").write_bytes(whole[:50] + bytes(len(whole) - 50))
    data = load_data(f"folder:{images}")
    options = {**OPTIONS, "runner": runner}
    with pytest.raises(ValueError, match=r"b/001\.png must be a whole JPEG"):
        annotate(folder / "teacher.keras", data, tmp_path / "labels", **options)
    (images / "b/001.png").write_bytes(whole)
    if runner is None:
        assert len(list((tmp_path / "labels").glob("train-*"))) == 2
    store = annotate(folder / "teacher.keras", data, tmp_path / "labels", **options)
    assert store.data_fingerprint == data.fingerprint
    store.check()


@pytest.mark.parametrize("finished", [False, True])
def test_another_teacher_or_other_data_are_refused(work, tmp_path, finished):
    folder, data = work
    labels = tmp_path / "labels"
    annotate(folder / "teacher.keras", data, labels, **OPTIONS)
    if not finished:
        (labels / "labels.json").rename(labels / "plan.json")
    before = content(labels)
    other = random_weights(network(classes=2, end=[keras.layers.Softmax()]))
    other.save(tmp_path / "other.keras")
    with pytest.raises(
        ValueError, match=r"their teacher is teacher\.keras .* other\.ke"
    ):
        annotate(tmp_path / "other.keras", data, labels, **OPTIONS)
    images = write_images(tmp_path / "photos", {"a": 14, "b": 15})
    with pytest.raises(
        ValueError, match=r"their data is .* now it is folder:photos \("
    ):
        annotate(
            folder / "teacher.keras", load_data(f"folder:{images}"), labels, **OPTIONS
        )
    with pytest.raises(ValueError, match="their top is 2, now it is 1"):
        annotate(folder / "teacher.keras", data, labels, **OPTIONS, top=1)
    assert content(labels) == before


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"batch_size": 0}, "batch_size must be a positive int, got 0"),
        ({"shard_size": 1.5}, r"shard_size must be a positive int, got 1\.5"),
        ({"top": 3}, r"top must be in 1\.\.2, the teacher's classes, got 3"),
        ({"normalization": "caffe"}, "normalization must be .* got 'caffe'"),
        ({"image_size": (16, 16)}, "image_size must be what 'network' takes"),
    ],
)
def test_options_that_do_not_fit_are_refused(work, tmp_path, change, sentence):
    folder, data = work
    with pytest.raises(ValueError, match=sentence):
        annotate(folder / "teacher.keras", data, tmp_path / "new", **change)
    assert not (tmp_path / "new").exists()


def test_a_teacher_of_other_classes_and_data_with_masks_are_refused(work, tmp_path):
    folder, data = work
    three = dataclasses.replace(data, labels=("a", "b", "c"))
    with pytest.raises(
        ValueError, match=r"one output for each of the 3 labels .* got 2"
    ):
        annotate(folder / "teacher.keras", three, tmp_path / "new")
    with pytest.raises(
        ValueError, match=r"images with a class each, .* 'digit_scenes:64"
    ):
        annotate(folder / "teacher.keras", few_scenes(), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="There is no model file nowhere"):
        annotate("nowhere.keras", data, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_classifier_of_the_tests_is_no_constant():
    """What the tests above compare would be equal otherwise."""
    found = ask(dense_classifier(random_weights(network(classes=2))), pictures())
    assert found.std((1, 2)).min() > 0.01


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(work, children, tmp_path):
    folder, data = work
    points = {2: 0.0, 3: random.uniform(0, 1.2 * PAUSE)}
    for child, (shards, seconds) in zip(children, points.items(), strict=True):
        child.start(folder, data, tmp_path / str(shards))
        child.kill(shards, seconds)
    assert list((tmp_path / "2").glob(".train-00001-*"))  # half written
    for shards in points:
        labels = tmp_path / str(shards)
        done = {x: x.stat().st_mtime_ns for x in labels.glob("train-*")}
        assert shards - 1 <= len(done) < 5
        with pytest.raises(ValueError, match="of 5 shards are missing"):
            open_labels(labels)
        annotate(folder / "teacher.keras", data, labels, **OPTIONS)
        assert content(labels) == content(folder / "labels")
        assert {x: x.stat().st_mtime_ns for x in done} == done


@pytest.mark.slow
def test_ten_kills_of_one_store_leave_no_trace(work, tmp_path):
    folder, data = work
    labels = tmp_path / "labels"
    for _ in range(10):
        child = SlowChild()
        child.start(folder, data, labels)
        child.kill(1, random.choice([0, PAUSE / 2, PAUSE, 1.2 * PAUSE]))
        for path in sorted(labels.glob("train-*"))[2:]:  # so that something is to do
            path.unlink()
    assert (labels / "plan.json").exists()
    annotate(folder / "teacher.keras", data, labels, **OPTIONS)
    assert content(labels) == content(folder / "labels")
