import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit.embedding import Preprocess
from training import Dataset, load_data, training_batches, validation_batches
from training.augment import random_affine

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


def test_a_tensorflow_dataset_is_read_by_name(tmp_path, monkeypatch):
    """A builder that is registered under its name, as those of the catalogue are."""
    import tensorflow_datasets as tfds

    from training import digits

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert digits.HandwrittenDigits.name == "handwritten_digits"
    data = load_data("tfds:handwritten_digits")
    assert isinstance(data, Dataset) and data.sizes["train"] == 1437
    assert data.fingerprint == load_data("digits").fingerprint


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
    import dataclasses

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
            augment=lambda x, seed: random_affine(x, seed, 30.0, 0.2, 0.2),
        )
        return np.concatenate([x.numpy() for x, _ in batches])

    whole = images(0)
    np.testing.assert_array_equal(images(1), whole[40:])
    assert np.abs(whole - whole[:, :1, :1]).max() > 10  # borders of 0 came in


def test_random_affine_with_zero_amounts_is_the_identity():
    x = tf.random.stateless_uniform((3, 7, 9, 3), (1, 2), 0, 255)
    y = random_affine(x, tf.constant([0, 1], tf.int64))
    np.testing.assert_allclose(y, x, atol=1e-3)


def test_random_affine_moves_by_what_it_was_told():
    """A single bright pixel in the middle never leaves the allowed square."""
    x = np.zeros((200, 21, 21, 1), "float32")
    x[:, 10, 10] = 1
    y = random_affine(tf.constant(x), tf.constant([3, 4], tf.int64), shift=0.1).numpy()
    rows, columns = np.nonzero(y.sum((0, 3)))
    assert rows.min() >= 7 and rows.max() <= 13 and columns.max() <= 13
    assert np.ptp(rows) >= 4 and np.ptp(columns) >= 4


def test_wrong_names_and_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'digits', 'tfds:NAME' or 'folder:PATH'"):
        load_data("cifar10")
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
