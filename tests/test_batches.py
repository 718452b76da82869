import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from test_data import few_scenes

from keras_vit.embedding import Preprocess
from training import Augmentation, load_data, training_batches
from training.data import subset

PREPROCESS = Preprocess((32, 32), None, "bilinear")
GRID = (8, 8)
EVERYTHING = Augmentation(
    random_resized_crop={"scale": (0.4, 1.0)},
    random_flip=True,
    rand_augment_geometry={"num_ops": 4},
    random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.1},
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
)


@pytest.fixture(scope="module")
def data():
    return subset(load_data("placed_digits:32"), 40, seed=0)


def batches(data, batch_size=20, epochs=1, **kwargs):
    kwargs = {"token_grid": GRID, **kwargs}
    return list(
        training_batches(
            data, PREPROCESS, batch_size, epochs=epochs, **kwargs
        ).as_numpy_iterator()
    )


def brightness(images):
    """Of each token: how far its brightest pixel is above the noise."""
    x = images.mean(-1).reshape(len(images), 8, 4, 8, 4)
    return x.max((2, 4))


def test_tokens_are_labelled_by_the_part_that_the_digit_covers(data):
    for images, labels in batches(data):
        assert set(labels) == {"class", "truth", "tokens"}
        assert labels["tokens"].shape == (20, 8, 8, 10)
        np.testing.assert_allclose(labels["tokens"].sum(-1), 1, atol=1e-5)
        np.testing.assert_array_equal(labels["class"], labels["truth"])
        digit = labels["truth"].argmax(-1)
        of_digit = labels["tokens"][np.arange(20), :, :, digit]
        assert of_digit.max((1, 2)) == pytest.approx(1)  # within the square
        assert of_digit.min((1, 2)) == pytest.approx(0.1)  # outside: all alike
        assert brightness(images)[of_digit < 0.11].max() <= 63


@pytest.mark.parametrize(
    "change",
    [
        {"random_flip": True},
        {"random_resized_crop": {"scale": (0.4, 0.6)}},
        {"rand_augment_geometry": {"num_ops": 6}},
        {"random_affine": {"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.2}},
        {
            name: getattr(EVERYTHING, name)
            for name in ("random_resized_crop", "random_flip", "random_affine")
        },
    ],
    ids=lambda change: "+".join(change),
)
def test_label_maps_go_where_their_digits_go(data, change):
    """Bright tokens have the label of the digit, tokens far from it have none."""
    augmentation = Augmentation(**change)
    plain = np.concatenate([x for x, _ in batches(data)])
    found = batches(data, augmentation=augmentation)
    assert np.abs(np.concatenate([x for x, _ in found]) - plain).mean() > 5
    for images, labels in found:
        digit = labels["truth"].argmax(-1)
        of_digit = labels["tokens"][np.arange(20), :, :, digit]
        bright = brightness(images) > 120
        assert bright.mean() > 0.05
        assert of_digit[bright].mean() > 0.75
        assert of_digit[bright].min() > 0.1
        np.testing.assert_allclose(labels["tokens"].sum(-1), 1, atol=1e-5)


def test_everything_at_once_keeps_rows_that_sum_to_1_and_repeats(data):
    first, second = (batches(data, 13, 2, augmentation=EVERYTHING) for _ in range(2))
    assert len(first) == 6
    for (images, labels), (again, labels_again) in zip(first, second, strict=True):
        np.testing.assert_array_equal(images, again)
        for name in labels:
            np.testing.assert_array_equal(labels[name], labels_again[name])
            np.testing.assert_allclose(labels[name].sum(-1), 1, atol=1e-5)
            assert labels[name].min() > 0.009  # smoothed
    resumed = batches(data, 13, 2, augmentation=EVERYTHING, first_epoch=1)
    for (images, _), (again, _) in zip(first[3:], resumed, strict=True):
        np.testing.assert_array_equal(images, again)


def test_a_batch_of_one_is_fine(data):
    (images, labels), *_ = batches(data, 1, augmentation=EVERYTHING)
    assert images.shape == (1, 32, 32, 3) and labels["tokens"].shape == (1, 8, 8, 10)


def test_labels_of_images_can_come_from_the_maps(data):
    for _, labels in batches(data, class_labels="maps"):
        mean = labels["tokens"].mean((1, 2))
        np.testing.assert_allclose(labels["class"], mean, atol=1e-5)
        assert np.abs(labels["class"] - labels["truth"]).max() > 0.2


def test_without_maps_every_token_has_the_label_of_its_image(data):
    blind = dataclasses.replace(data, label_maps=None)
    for _, labels in batches(blind):
        tiled = np.broadcast_to(labels["truth"][:, None, None], (20, 8, 8, 10))
        np.testing.assert_array_equal(labels["tokens"], tiled)
    cut = Augmentation(cutmix=1.0)
    regions = [labels["tokens"] for _, labels in batches(blind, augmentation=cut)]
    values = np.concatenate([x.max(-1).ravel() for x in regions])
    assert (values == 1).mean() > 0.5  # all but the tokens at the seam are of one image


def test_labels_are_soft_where_they_are_mixed_or_smoothed_and_classes_elsewhere(data):
    (_, labels), *_ = batches(data, token_grid=None)
    assert labels.dtype == "int64" and labels.shape == (20,)
    for change in ({"mixup": 0.2}, {"cutmix": 1.0}, {"label_smoothing": 0.1}):
        augmentation = Augmentation(**change)
        (_, soft), *_ = batches(data, token_grid=None, augmentation=augmentation)
        assert soft.shape == (20, 10) and soft.dtype == "float32"
        np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(soft.max(-1), 0.91, atol=1e-6)


def test_the_crop_that_a_model_records_crops_the_label_map_too(data):
    """A crop of 1/2 shows the middle of the file alone."""
    half = Preprocess((32, 32), 0.5, "bilinear")
    (_, labels), *_ = training_batches(
        data, half, 40, epochs=1, token_grid=GRID
    ).as_numpy_iterator()
    (_, whole), *_ = training_batches(
        data, PREPROCESS, 40, epochs=1, token_grid=(16, 16)
    ).as_numpy_iterator()
    error = np.abs(labels["tokens"] - whole["tokens"][:, 4:12, 4:12])
    # Two cells of the map a token, read bilinearly, against the means of two.
    assert error.mean() < 0.005 and error.max() < 0.25
    assert np.abs(labels["tokens"] - whole["tokens"][:, ::2, ::2]).mean() > 0.03


@pytest.mark.parametrize(
    "kwargs",
    [
        {"token_grid": GRID},
        {"augmentation": Augmentation(mixup=0.1)},
        {"augmentation": Augmentation(random_resized_crop={})},
    ],
)
def test_masks_are_not_cropped_mixed_or_read_as_token_labels(kwargs):
    with pytest.raises(ValueError, match=r"'digit_scenes:64' has masks: random_resiz"):
        training_batches(few_scenes(), PREPROCESS, 4, epochs=1, **kwargs)


def test_labels_from_maps_need_maps(data):
    blind = dataclasses.replace(data, label_maps=None)
    with pytest.raises(ValueError, match=r"needs label maps; make some with keras-vit"):
        batches(blind, class_labels="maps")


def test_images_are_tensors_of_the_size_that_the_model_takes(data):
    spec = training_batches(
        data, PREPROCESS, 20, epochs=1, token_grid=GRID
    ).element_spec
    assert spec[0] == tf.TensorSpec((20, 32, 32, 3), tf.float32)
    assert spec[1]["tokens"].shape == (20, 8, 8, 10)
