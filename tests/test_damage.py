import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from test_data import PREPROCESS, few_scenes, order, write_images
from test_loop import RECIPE as LOOP_RECIPE

import training
from training import training_batches, validation_batches
from training.damage import Damage
from training.progress import Progress

RECIPE = LOOP_RECIPE.replace(
    epochs=2, depth=1, embed_dim=12, num_heads=2, dropout=0.0, attention_dropout=0.0
)


def build():
    return RECIPE.build_model(2)


TRAIN = ("a/003", "b/000", "b/011")
HELD_OUT = ("a/001", "b/003")


def damage(folder, names):
    """A truncated file, an empty one, and one that is text."""
    for i, name in enumerate(names):
        path = folder / f"{name}.png"
        content = path.read_bytes()
        path.write_bytes([content[: len(content) // 2], b"", b"a text"][i % 3])


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images" / "train", {"a": 12, "b": 12})
    write_images(tmp_path / "images" / "validation", {"a": 4, "b": 4})
    return tmp_path / "images"


@pytest.fixture
def damaged(folder):
    damage(folder / "train", TRAIN)
    damage(folder / "validation", HELD_OUT)
    return training.load_data(f"folder:{folder}")


def files(folder, part, names):
    return [str(folder / part / f"{name}.png") for name in names]


def batches(data, batch_size=4, epochs=2, tell=None, **kwargs):
    stream = training_batches(
        data, PREPROCESS, batch_size, epochs=epochs, damaged=tell, **kwargs
    )
    return list(stream.as_numpy_iterator())


@pytest.mark.first
def test_the_next_whole_image_of_a_batch_stands_in_for_a_damaged_one(folder):
    data = training.load_data(f"folder:{folder}")
    kwargs = {"seed": 3}
    whole = batches(data, **kwargs)
    shown = order(training_batches(data, PREPROCESS, 4, epochs=2, seed=3))
    damage(folder / "train", TRAIN)
    found = []
    mended = batches(data, tell=found.extend, **kwargs)
    assert len(mended) == len(whole) == 12
    lost = {(ord(x[0]) - ord("a"), int(x[2:])) for x in TRAIN}
    holes = [i for i, image in enumerate(shown) if image in lost]
    assert sorted(found) == holes and len(holes) == 6
    for step, ((images, labels), (before, truth)) in enumerate(
        zip(mended, whole, strict=True)
    ):
        rows = range(4 * step, 4 * step + 4)
        for row in rows:
            ahead = [*range(row, rows[-1] + 1), *rows]
            source = next(i for i in ahead if i not in holes) % 4
            np.testing.assert_array_equal(images[row % 4], before[source])
            assert labels[row % 4] == truth[source]
    found.clear()
    rest = batches(data, tell=found.extend, first_epoch=1, **kwargs)
    for (images, _), (again, _) in zip(mended[6:], rest, strict=True):
        np.testing.assert_array_equal(images, again)
    assert sorted(found) == [i for i in holes if i >= 24]


@pytest.mark.first
def test_a_batch_without_a_whole_image_is_the_next_one_also_at_the_end(folder):
    data = training.load_data(f"folder:{folder}")
    shown = order(training_batches(data, PREPROCESS, 1, epochs=2))
    beyond = order(training_batches(data, PREPROCESS, 1, epochs=3, first_epoch=2))
    lost = [shown[47], shown[4], shown[5]]
    damage(folder / "train", [f"{'ab'[x]}/{i:03d}" for x, i in lost])
    found = []
    stream = training_batches(data, PREPROCESS, 1, epochs=2, damaged=found.extend)
    ahead = shown + beyond
    expected = [next(x for x in ahead[i:] if x not in lost) for i in range(48)]
    assert order(stream) == expected and expected[4] == shown[6]


@pytest.mark.first
def test_processes_skip_what_is_damaged_among_their_own_rows(folder):
    damage(folder / "train", TRAIN)
    data = training.load_data(f"folder:{folder}")
    told = [[], []]
    for process, found in enumerate(told):
        part = batches(data, 8, tell=found.extend, part=(process, 2))
        assert [len(images) for images, _ in part] == [4] * 6
    assert not set(told[0]) & set(told[1]) and len(told[0] + told[1]) == 6


@pytest.mark.first
def test_another_error_is_not_taken_for_damage(folder):
    """A label map that cannot be read stops the run, though it comes with an image."""

    def broken():
        raise ValueError("x must hold the label maps that were written; damaged: y.")

    maps = tf.data.Dataset.range(24).map(
        lambda i: tf.numpy_function(broken, [], (tf.float16, tf.int32))
    )
    maps = maps.map(lambda *x: tuple(tf.ensure_shape(y, (2, 2, 2)) for y in x))
    data = training.load_data(f"folder:{folder}")
    data = dataclasses.replace(data, label_maps=lambda: maps)
    with pytest.raises(tf.errors.OpError, match="label maps that were written"):
        batches(data, tell=print, token_grid=(2, 2))


@pytest.mark.slow
@pytest.mark.first
def test_a_mask_of_another_size_is_damage_of_its_image():
    images, masks = zip(*few_scenes().stream("train").as_numpy_iterator(), strict=True)
    masks = [masks[0][:99], *masks[1:]]
    masks[5] = tf.io.encode_png(np.zeros((63, 64, 1), "uint8")).numpy()
    stream = tf.data.Dataset.from_tensor_slices((list(images), masks)).take(8)
    data = dataclasses.replace(
        few_scenes(),
        sizes={"train": 8, "validation": 8},
        stream=lambda part: stream,
        shuffle_buffer=8,
        whole=False,
    )
    found, held_out = [], []
    ((_, labels),) = batches(data, 8, 1, found.extend)
    assert len(found) == 2 and (labels < 11).all()
    shown = validation_batches(data, PREPROCESS, 4, damaged=held_out.extend)
    assert [len(x) for x, _ in shown] == [4, 2] and sorted(held_out) == [0, 5]


@pytest.mark.slow
@pytest.mark.first
def test_a_run_names_what_is_damaged_once_and_resumes_all_the_same(
    damaged, folder, tmp_path, capsys
):
    model = training.fit(build, damaged, RECIPE, tmp_path / "run")
    said = capsys.readouterr().out
    names = files(folder, "train", TRAIN), files(folder, "validation", HELD_OUT)
    for sentence in (
        "3 training images are damaged and replaced, each by another of its batch: "
        f"{', '.join(names[0])}. Repair or remove what is damaged; more than "
        "damaged_images=100 stop the run.",
        "2 held-out images are damaged and left out of the score: "
        f"{', '.join(names[1])}. Repair",
    ):
        assert said.count(sentence) == 1
    listed = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert listed == [*names[0], *names[1]]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "on_epoch_begin", stop_in_epoch_2)
        training.fit(build, damaged, RECIPE, tmp_path / "again")
    again = training.fit(build, damaged, RECIPE, tmp_path / "again")
    for one, other in zip(model.weights, again.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))
    result = training.evaluate(model, damaged, 3)
    assert "2 held-out images are damaged and left out" in capsys.readouterr().out
    assert result["accuracy"] * 6 == pytest.approx(round(result["accuracy"] * 6))


begin_epoch = Progress.on_epoch_begin


def stop_in_epoch_2(callback, epoch, logs=None):
    if epoch == 1:
        raise KeyboardInterrupt
    begin_epoch(callback, epoch, logs)


@pytest.mark.first
@pytest.mark.parametrize("limit", [0, 2])
def test_too_many_damaged_images_are_named_and_refused(
    damaged, folder, tmp_path, limit
):
    damage = Damage(damaged, RECIPE.replace(damaged_images=limit), 24, tmp_path)
    damage.on_epoch_begin(0)
    batches(damaged, 8, 1, damage.train)
    with pytest.raises(ValueError, match=rf"^3 .* damaged_images={limit}: .*000\.png"):
        damage.on_train_batch_end(0)  # it does not wait for the end of the epoch
    listed = (tmp_path / "damaged.txt").read_text().splitlines()
    assert listed == files(folder, "train", TRAIN)


@pytest.mark.first
def test_what_a_later_epoch_found_is_told_at_its_end(damaged, tmp_path, capsys):
    damage = Damage(damaged, RECIPE, 24, tmp_path)
    batches(damaged, 8, 2, damage.train, first_epoch=1)  # ahead of the training
    damage.on_epoch_begin(0)
    damage.on_epoch_end(0)
    assert capsys.readouterr().out == "" and not damage.path.exists()
    damage.on_epoch_begin(1)
    damage.on_epoch_end(1)
    assert "3 training images are damaged" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.first
def test_a_run_that_was_stopped_goes_on_with_a_higher_limit(damaged, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="damaged, more than damaged_images=2: "):
        training.fit(build, damaged, RECIPE.replace(damaged_images=2), run)
    training.fit(build, damaged, RECIPE.replace(damaged_images=3), run)
    assert len((run / "history.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.first
@pytest.mark.parametrize("part", ["train", "validation"])
def test_where_everything_is_damaged_one_sentence_says_so(folder, tmp_path, part):
    names = [x.relative_to(folder / part) for x in (folder / part).rglob("*.png")]
    damage(folder / part, [x.with_suffix("") for x in names])
    data = training.load_data(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"and \d+ more must be a whole JPEG"):
        training.fit(build, data, RECIPE, tmp_path / "run")


@pytest.mark.first
def test_images_without_files_are_named_by_their_number():
    data = training.load_data("digits")
    assert data.names_of("validation", [7, 3]) == [
        "image 7 of validation",
        "image 3 of validation",
    ]
