import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from test_data import few_scenes

from keras_vit.embedding import Preprocess
from training import Augmentation, load_data, training_batches
from training.contact_sheet import _caption, _few, draw_training, in_words
from training.data import subset

PREPROCESS = Preprocess((32, 32), None, "bilinear")


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_sheet_has_a_line_for_each_image_and_a_column_for_each_epoch(tmp_path):
    """Images of one colour each, by their number, and nothing done to them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    files = [tf.io.encode_png(np.full((8, 8, 3), c, "uint8")).numpy() for c in colours]
    data = dataclasses.replace(
        load_data("digits"),
        stream=lambda part: tf.data.Dataset.from_tensor_slices((files, [4, 5, 6])),
        sizes={"train": 3, "validation": 3},
        shuffle_buffer=3,
    )
    path = tmp_path / "new" / "sheet.png"
    draw_training(data, PREPROCESS, None, path, rows=3, columns=4)
    pixels = pixels_of(path)
    tops = []
    for colour in colours:
        rows, columns = np.nonzero(np.abs(pixels - colour).max(-1) < 2)
        starts = np.diff(np.unique(columns)) > 1  # gaps between the images of a line
        assert starts.sum() == 4 and np.ptp(rows) < 0.3 * len(pixels)
        tops.append(rows.min())
    assert tops == sorted(tops)


def test_a_sheet_shows_what_training_batches_give(tmp_path, monkeypatch):
    """The very pixels and labels, each beside the image that it was."""
    data = subset(load_data("digits"), 60, seed=0)
    augmentation = Augmentation(
        random_affine={"shift": 0.2}, mixup=0.8, repeats=2, label_smoothing=0.1
    )
    drawn = {}
    monkeypatch.setattr(
        "training.contact_sheet._draw",
        lambda frames, names, augmentation, title, path: drawn.update(
            frames=frames, title=title
        ),
    )
    draw_training(
        data, PREPROCESS, augmentation, tmp_path / "x.png", rows=4, columns=5, seed=3
    )
    (_, classes), *frames = drawn["frames"]
    assert len(frames) == 5 and len(set(classes.tolist())) == 4
    few, _ = _few(data, 4, 3, with_maps=False)
    batches = training_batches(
        few,
        PREPROCESS,
        4,
        epochs=5,
        seed=3,
        augmentation=dataclasses.replace(augmentation, repeats=1),
    ).as_numpy_iterator()
    for (images, labels), (found, soft) in zip(frames, batches, strict=True):
        for image, label in zip(images, labels, strict=True):
            same = [np.array_equal(image, x) for x in found]
            assert sum(same) == 1
            np.testing.assert_array_equal(soft[same.index(True)], label)
    mostly = np.mean([labels.argmax(-1) == classes for _, labels in frames], axis=1)
    assert (
        set(mostly) <= {0, 1} and mostly.any()
    )  # each beside its own, if lambda > 1/2
    assert "each image 2 times" in drawn["title"].replace("\xa0", " ")


@pytest.mark.slow
def test_masks_and_labels_of_tokens_stand_under_their_images(tmp_path):
    draw_training(few_scenes(), PREPROCESS, None, tmp_path / "a.png", rows=2, columns=2)
    maps = subset(load_data("placed_digits:32"), 30, seed=0)
    kwargs = {"rows": 2, "columns": 2, "token_grid": (4, 4)}
    change = Augmentation(cutmix=1.0)
    draw_training(maps, PREPROCESS, change, tmp_path / "b.png", **kwargs)
    draw_training(maps, PREPROCESS, change, tmp_path / "c.png", rows=2, columns=2)
    heights = {x: len(pixels_of(tmp_path / f"{x}.png")) for x in "abc"}
    assert min(heights["a"], heights["b"]) > 1.5 * heights["c"]
    for name in "ab":
        pixels = pixels_of(tmp_path / f"{name}.png")
        coloured = np.ptp(pixels, axis=-1) > 60
        assert coloured[: len(pixels) * 9 // 10].mean() > 0.01  # above the legend


def test_captions_tell_what_an_image_is_trained_towards():
    names = ("7", "3", "5", "a tabby cat with a long name")
    assert _caption(1, names, 0) == "3"
    assert _caption(np.array([0.62, 0.38, 0, 0]), names, 0) == "7 62 % + 3 38 %"
    smooth = 0.9 * np.array([1.0, 0, 0, 0]) + 0.1 / 4
    assert _caption(smooth, names, 0.1) == "7 92 %"
    assert _caption(np.full(4, 0.25), names, 1.0) == "all alike"
    lines = _caption(np.array([0.6, 0, 0, 0.4]), names, 0).split("\n")
    assert lines == ["7 60 %", "+ a tabby cat … 40 %"]


def test_an_augmentation_is_told_in_words():
    assert in_words(Augmentation()) == ["no augmentation"]
    everything = Augmentation(
        repeats=3,
        random_resized_crop={"scale": (0.05, 1.0)},
        random_flip=True,
        rand_augment={"magnitude": 7.0},
        three_augment=True,
        color_jitter=0.3,
        random_affine={"rotation_degrees": 10.0, "shift": 0.1},
        random_erasing=0.25,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        mix_probability=0.5,
    )
    assert ", ".join(in_words(everything)) == (
        "each image 3 times in a row, crops of 5 % to 100 %, every second one "
        "mirrored, RandAugment (2 at 7), grey, solarized or blurred, colours jittered "
        "by 30 %, turned by up to 10 degrees, shifted by up to 10 %, a box of noise "
        "in 25 %, labels smoothed by 0.1, MixUp 0.8 or CutMix 1 in 50 % of the batches"
    )


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"columns": -1}, {"rows": 2.0}])
def test_a_sheet_has_rows_and_columns(wrong, tmp_path):
    with pytest.raises(ValueError, match=r"(rows|columns) must be a positive int, got"):
        draw_training(load_data("digits"), PREPROCESS, None, tmp_path / "x", **wrong)
