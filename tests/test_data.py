import dataclasses
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit.embedding import PixelNormalization, Preprocess
from training import (
    Augmentation,
    Dataset,
    load_data,
    training_batches,
    validation_batches,
)
from training.data import subset
from training.digits import read_digits
from training.scenes import THRESHOLD

PREPROCESS = Preprocess((16, 16), None, "bilinear")


def write_images(folder, counts):
    """PNG files `folder/CLASS/i.png`; red tells the class, green tells i."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((9, 12, 3), (50 * label, 5 * i, 0), "uint8")
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


def order(batches):
    """What an epoch showed, as a list of (class, i)."""
    return [
        (round(float(image[0, 0, 0]) / 50), round(float(image[0, 0, 1]) / 5))
        for images, _ in batches.as_numpy_iterator()
        for image in images
    ]


@functools.cache
def few_scenes(train=48, validation=12, size=64):
    """The first scenes of `digit_scenes`."""
    data = load_data(f"digit_scenes:{size}")
    sizes = {"train": train, "validation": validation}
    streams = {part: data.stream(part).take(count) for part, count in sizes.items()}
    return dataclasses.replace(data, sizes=sizes, stream=streams.__getitem__)


def tiny_segmenter(num_classes=11):
    """A model with logits for each pixel of images of any size."""
    images = keras.Input((None, None, 3))
    x = PixelNormalization(interpolation="bilinear")(images)
    x = keras.layers.Conv2D(8, 5, padding="same", activation="relu")(x)
    x = keras.layers.Dropout(0.1, noise_shape=(None, None, None, 8))(x)
    return keras.Model(images, keras.layers.Conv2D(num_classes, 1, name="head")(x))


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", {"cat": 20, "dog": 30})


def test_digits_are_the_real_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert data.sizes == {"train": 1437, "validation": 360}
    assert data.labels == tuple("0123456789")
    preprocess = Preprocess((8, 8), None, "bilinear")
    found = [
        (*np.round(image[..., 0] * 16 / 255).astype(int).ravel(), label)
        for images, labels in validation_batches(data, preprocess, 64)
        for image, label in zip(images.numpy(), labels.numpy(), strict=True)
    ]
    digits = load_digits()
    every = {
        (*image.astype(int).ravel(), label)
        for image, label in zip(digits.images, digits.target, strict=True)
    }
    assert len(found) == 360 and set(found) <= every


def test_digits_are_split_as_read_digits_says():
    """Scenes take their digits from there."""
    data = load_data("digits")
    for part, split in (("train", "train"), ("validation", "test")):
        images, labels = read_digits()[split]
        pairs = list(data.stream(part).as_numpy_iterator())
        assert [label for _, label in pairs] == labels.tolist()
        found = [data.read(tf.constant(handle)).numpy() for handle, _ in pairs]
        found = [tf.io.decode_png(x, channels=1)[..., 0] for x in found]
        np.testing.assert_array_equal(np.stack(found), images)


def test_a_tensorflow_dataset_is_read_by_name(tmp_path, monkeypatch):
    """A builder that is registered under its name, as those of the catalogue are."""
    import tensorflow_datasets as tfds

    from training import digits

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert digits.HandwrittenDigits.name == "handwritten_digits"
    data = load_data("tfds:handwritten_digits")
    assert isinstance(data, Dataset) and data.sizes["train"] == 1437
    assert data.fingerprint == load_data("digits").fingerprint


def test_a_prepared_dataset_is_found_in_its_folder(tmp_path):
    """One that is registered, and one that no code makes any more."""
    import tensorflow_datasets as tfds

    from training.digits import HandwrittenDigits

    with tfds.core.registered.skip_registration():

        class UnknownDigits(HandwrittenDigits):
            pass

    for kind in (HandwrittenDigits, UnknownDigits):
        kind(data_dir=tmp_path).download_and_prepare()
    known = load_data("tfds:handwritten_digits", data_dir=str(tmp_path))
    found = load_data("tfds:unknown_digits", data_dir=str(tmp_path))
    direct = tmp_path / "unknown_digits" / "1.0.0"
    same = load_data("tfds:unknown_digits", data_dir=str(direct))
    assert found.sizes == known.sizes == same.sizes
    assert found.labels == known.labels and found.fingerprint == same.fingerprint
    pixels = [next(iter(x.stream("train")))[0] for x in (known, found, same)]
    assert pixels[0] == pixels[1] == pixels[2]
    with pytest.raises(ValueError, match=r"no dataset 'unknown_digits'\."):
        load_data("tfds:unknown_digits")
    with pytest.raises(ValueError, match=r"no dataset 'other', and '.*' holds none of"):
        load_data("tfds:other", data_dir=str(tmp_path))


def test_a_folder_of_datasets_is_for_datasets_of_the_catalogue(tmp_path):
    with pytest.raises(ValueError, match=r"data_dir is where .* with 'digits'; leave"):
        load_data("digits", data_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"data_dir must be a folder, .* got 'ram://x'"
    ):
        load_data("tfds:mnist", data_dir="ram://x")


def test_a_folder_of_classes_holds_out_every_tenth_image(folder):
    data = load_data(f"folder:{folder}")
    assert data.labels == ("cat", "dog")
    assert data.sizes == {"train": 45, "validation": 5}
    held_out = order(validation_batches(data, PREPROCESS, 2))
    assert held_out == [(0, 9), (0, 19), (1, 9), (1, 19), (1, 29)]
    train = order(training_batches(data, PREPROCESS, 45, epochs=1))
    assert not set(train) & set(held_out) and len(set(train)) == 45


def test_a_folder_with_train_and_validation_is_taken_as_it_is(tmp_path):
    write_images(tmp_path / "train", {"a": 3, "b": 4})
    write_images(tmp_path / "val", {"b": 2})
    data = load_data(f"folder:{tmp_path}")
    assert data.sizes == {"train": 7, "validation": 2}
    labels = [y for _, y in validation_batches(data, PREPROCESS, 2)]
    assert labels[0].numpy().tolist() == [1, 1]


def test_the_order_depends_on_seed_and_epoch_alone(folder):
    data = load_data(f"folder:{folder}")

    def epochs(first, last, seed=0):
        batches = training_batches(
            data, PREPROCESS, 10, epochs=last, first_epoch=first, seed=seed
        )
        return order(batches)

    whole = epochs(0, 3)
    assert len(whole) == 120  # 4 complete batches of 10 of 45 images, 3 times
    assert whole[:40] != whole[40:80]
    assert epochs(1, 3) == whole[40:]
    assert epochs(0, 1, seed=1) != whole[:40]
    assert sorted(set(whole[:40])) == sorted(whole[:40])  # none twice


def test_windows_smaller_than_the_data_still_show_every_image(folder):
    data = dataclasses.replace(load_data(f"folder:{folder}"), shuffle_buffer=8)
    shown = order(training_batches(data, PREPROCESS, 45, epochs=1))
    assert len(set(shown)) == 45 and shown != sorted(shown)


def test_augmentation_is_part_of_what_a_resumed_run_repeats(folder):
    data = load_data(f"folder:{folder}")

    def images(first):
        batches = training_batches(
            data,
            PREPROCESS,
            10,
            epochs=2,
            first_epoch=first,
            augmentation=Augmentation(
                random_affine={"rotation_degrees": 30.0, "zoom": 0.2, "shift": 0.2}
            ),
        )
        return np.concatenate([x.numpy() for x, _ in batches])

    whole = images(0)
    np.testing.assert_array_equal(images(1), whole[40:])
    assert np.abs(whole - whole[:, :1, :1]).max() > 10  # borders of 0 came in


def test_a_subset_is_drawn_by_its_seed_in_the_order_of_the_whole(folder):
    data = load_data(f"folder:{folder}")
    whole = [(x, y) for x, y in data.stream("train").as_numpy_iterator()]
    some = subset(data, 12, seed=1)
    assert some.sizes == {"train": 12, "validation": 5}
    found = [(x, y) for x, y in some.stream("train").as_numpy_iterator()]
    places = [whole.index(pair) for pair in found]
    assert len(places) == 12 and places == sorted(set(places))
    assert {label for _, label in found} == {0, 1}
    again = subset(data, 12, seed=1).stream("train").as_numpy_iterator()
    assert list(again) == found
    assert list(subset(data, 12, seed=2).stream("train").as_numpy_iterator()) != found
    assert order(training_batches(some, PREPROCESS, 12, epochs=1))
    with pytest.raises(ValueError, match=r"train_images must be in 1\.\.45, .* got 46"):
        subset(data, 46, seed=0)


def test_wrong_names_and_folders_are_refused(tmp_path):
    for name in ("cifar10", "digit_scenes:", "digit_scenes:large", "digits:64", None):
        with pytest.raises(ValueError, match=r"'folder:PATH' or 'arrays:.*', got"):
            load_data(name)
    with pytest.raises(ValueError, match=r"no dataset 'mnst'.* mean 'mnist'"):
        load_data("tfds:mnst")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="at least 2 classes, got 0"):
        load_data(f"folder:{tmp_path}")
    write_images(tmp_path / "few", {"a": 3, "b": 3})
    with pytest.raises(ValueError, match="at least 10 images of some class"):
        load_data(f"folder:{tmp_path / 'few'}")
    write_images(tmp_path / "split" / "train", {"a": 3, "b": 3})
    write_images(tmp_path / "split" / "test", {"c": 1})
    with pytest.raises(ValueError, match="missing there: c"):
        load_data(f"folder:{tmp_path / 'split'}")


def test_too_large_a_batch_is_refused(folder):
    data = load_data(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"at most the 45 training images .* got 46"):
        training_batches(data, PREPROCESS, 46, epochs=1)


SCENES = Preprocess((64, 64), None, "bilinear")


def test_masks_arrive_with_their_images():
    data = few_scenes()
    for batches in (
        training_batches(data, SCENES, 12, epochs=1),
        validation_batches(data, SCENES, 12),
    ):
        for images, masks in batches:
            assert images.shape == (12, 64, 64, 3) and images.dtype == tf.float32
            assert masks.shape == (12, 64, 64) and masks.dtype == tf.uint8
            bright = images.numpy()[..., 0] >= THRESHOLD
            np.testing.assert_array_equal(bright, masks.numpy() > 0)


def test_masks_are_augmented_with_their_images():
    augmentation = Augmentation(random_affine={"shift": 0.3})
    batches = training_batches(
        few_scenes(), SCENES, 12, epochs=1, augmentation=augmentation
    )
    for images, masks in batches:
        images, masks = images.numpy()[..., 0], masks.numpy()
        outside = masks == 255
        assert outside.any(axis=(1, 2)).all() and images[outside].mean() < 1
        wrong = (images >= THRESHOLD) != (masks > 0)
        # A pixel of bilinear and nearest differ at the edge of a digit alone.
        assert wrong[~outside].mean() < 0.03


@pytest.mark.parametrize("damage", ["truncated", "of three channels", "smaller"])
def test_a_damaged_mask_is_named(damage):
    images, masks = zip(*few_scenes().stream("train").as_numpy_iterator(), strict=True)
    masks = list(masks)
    if damage == "truncated":
        masks[7] = masks[7][:100]
    else:
        shape = (64, 64, 3) if damage == "of three channels" else (63, 64, 1)
        masks[7] = tf.io.encode_png(np.zeros(shape, "uint8")).numpy()
    stream = tf.data.Dataset.from_tensor_slices((list(images), masks))
    streams = {"train": stream, "validation": stream.take(0)}
    data = dataclasses.replace(few_scenes(), stream=streams.__getitem__)
    sentence = "image 7 of train must be .* with a PNG mask of one channel and its size"
    with pytest.raises(ValueError, match=sentence), data.naming_damaged_files():
        list(training_batches(data, SCENES, 12, epochs=1))
