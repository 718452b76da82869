import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from test_data import few_scenes

from keras_vit.embedding import Preprocess
from training import (
    Augmentation,
    load_data,
    training_batches,
    validation_batches,
)
from training.data import subset

PREPROCESS = Preprocess((32, 32), None, "bilinear")
GRID = (8, 8)
EVERYTHING = Augmentation(
    random_resized_crop={"scale": (0.4, 1.0)},
    random_flip=True,
    rand_augment={"num_ops": 2},
    three_augment=True,
    color_jitter=0.3,
    random_erasing=0.5,
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
        {"random_affine": {"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.2}},
        pytest.param(
            {
                name: getattr(EVERYTHING, name)
                for name in ("random_resized_crop", "random_flip", "random_affine")
            },
            marks=pytest.mark.slow,
        ),
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
        check_bright_tokens(images, of_digit)
        np.testing.assert_allclose(labels["tokens"].sum(-1), 1, atol=1e-5)


def check_bright_tokens(images, of_digit):
    bright = brightness(images) > 120
    assert bright.mean() > 0.05
    assert of_digit[bright].mean() > 0.75
    assert of_digit[bright].min() > 0.1


@pytest.mark.slow
def test_label_maps_go_where_rand_augment_moves_their_digits(data):
    """Of one operation an image either moves, and keeps its colours, or does not."""
    rand = Augmentation(rand_augment={"num_ops": 1})
    plain, found = batches(data, 40, 3), batches(data, 40, 3, augmentation=rand)
    moved = coloured = 0
    for (images, labels), (before, stays) in zip(found, plain, strict=True):
        moves = np.abs(labels["tokens"] - stays["tokens"]).max((1, 2, 3)) > 1e-3
        digit = labels["truth"].argmax(-1)
        of_digit = labels["tokens"][np.arange(40), :, :, digit]
        check_bright_tokens(images[moves], of_digit[moves])
        moved += moves.sum()
        coloured += (np.abs(images - before).max((1, 2, 3)) > 1)[~moves].sum()
    assert moved > 10 and coloured > 20


def handles(data, epochs=1, batch_size=20, **kwargs):
    """Number of the image at each place of each epoch: `(epochs, images)`."""
    stream = data.stream("train")
    numbered = dataclasses.replace(
        data,
        stream=lambda part: stream.enumerate().map(lambda i, x: (x[0], i)),
        labels=tuple(map(str, range(data.sizes["train"]))),
    )
    kwargs = {"token_grid": None, **kwargs}
    found = [y for _, y in batches(numbered, batch_size, epochs, **kwargs)]
    return np.reshape(
        np.concatenate(found), (epochs - kwargs.get("first_epoch", 0), -1)
    )


def test_repeats_follow_each_other_and_leave_an_epoch_as_long(data):
    for repeats, window in ((3, 40), (2, 7)):
        some = dataclasses.replace(data, shuffle_buffer=window)
        often = Augmentation(repeats=repeats)
        shown = handles(some, 6, augmentation=often)
        assert shown.shape == (6, 40)
        for epoch in shown:
            copies = epoch[: 40 // repeats * repeats].reshape(-1, repeats)
            assert (copies == copies[:, :1]).all()
            assert len(np.unique(epoch)) == -(-40 // repeats)
            # No part of the data waits for another epoch.
            parts = np.histogram(np.unique(epoch), 4, (0, 40))[0]
            assert window == 40 or parts.min() >= 10 // repeats - 2
        assert len(np.unique(shown)) > 30 and (shown[0] != shown[1]).any()
        resumed = handles(some, 6, augmentation=often, first_epoch=4)
        np.testing.assert_array_equal(resumed, shown[4:])


def test_each_copy_is_augmented_anew_and_its_map_follows(data):
    change = Augmentation(repeats=2, random_affine={"shift": 0.3})
    for images, labels in batches(data, augmentation=change):
        pairs = images.reshape(10, 2, -1)
        assert (np.abs(pairs[:, 0] - pairs[:, 1]).mean(-1) > 1).all()
        np.testing.assert_array_equal(labels["truth"][::2], labels["truth"][1::2])
        digit = labels["truth"].argmax(-1)
        of_digit = labels["tokens"][np.arange(20), :, :, digit]
        check_bright_tokens(images, of_digit)


def test_colours_and_erasing_leave_labels_alone(data):
    change = {"three_augment": True, "color_jitter": 0.4, "random_erasing": 1.0}
    plain = batches(data, 40)
    found = batches(data, 40, augmentation=Augmentation(**change))
    for (images, labels), (before, stays) in zip(found, plain, strict=True):
        assert (np.abs(images - before).mean((1, 2, 3)) > 0.2).mean() > 0.6
        for name in labels:
            np.testing.assert_array_equal(labels[name], stays[name])


@pytest.mark.slow
def test_erasing_comes_after_the_warp_and_before_the_mix(data):
    """A box that had been turned would have slanted sides."""
    change = {"random_affine": {"rotation_degrees": 45.0}}
    erases = {**change, "random_erasing": 1.0}
    ((before, _),) = batches(data, 40, augmentation=Augmentation(**change))
    ((images, _),) = batches(data, 40, augmentation=Augmentation(**erases))
    noise = (images != before).any(-1)
    area = noise.any(1).sum(1) * noise.any(2).sum(1)
    np.testing.assert_array_equal(noise.sum((1, 2)), area)
    assert (area > 0).mean() > 0.9
    mixed = Augmentation(**erases, mixup=1.0)
    ((halves, _),) = batches(data, 40, augmentation=mixed)
    share = np.linalg.lstsq(
        np.stack([images.ravel(), images[::-1].ravel()], 1), halves.ravel(), rcond=None
    )[0]
    assert share.sum() == pytest.approx(1, abs=1e-3) and 0 < share[0] < 1


@pytest.mark.slow
def test_masks_keep_their_classes_under_every_colour():
    scenes = few_scenes()
    change = {"rand_augment": {"num_ops": 2}, "random_flip": True}
    kwargs = {"epochs": 1, "augmentation": Augmentation(**change)}
    colours = {"three_augment": True, "color_jitter": 0.3, "random_erasing": 1.0}
    more = {**kwargs, "augmentation": Augmentation(**change, **colours)}
    for kind in (kwargs, more):
        images, masks = next(
            training_batches(scenes, PREPROCESS, 12, **kind).as_numpy_iterator()
        )
        kind["found"] = images, masks
    np.testing.assert_array_equal(kwargs["found"][1], more["found"][1])
    assert np.abs(kwargs["found"][0] - more["found"][0]).mean() > 5


@pytest.mark.slow
def test_batches_are_mixed_and_cut_as_often_as_the_recipe_says(data):
    plain = batches(data, 2, 2, token_grid=None)

    def kinds(**kwargs):
        change = Augmentation(mixup=1.0, cutmix=1.0, **kwargs)
        found = batches(data, 2, 2, token_grid=None, augmentation=change)
        for (images, _), (mixed, labels) in zip(plain, found, strict=True):
            if labels.max() == 1:  # not mixed, or both of one class
                continue
            pure = np.abs(mixed - images).max(-1) < 1e-3
            pure |= np.abs(mixed - images[::-1]).max(-1) < 1e-3
            yield "cut" if pure.all() else "blend"

    assert set(kinds(cutmix_probability=1.0)) == {"cut"}
    assert set(kinds(cutmix_probability=0.0)) == {"blend"}
    assert 5 < len(list(kinds(mix_probability=0.5))) < 30


@pytest.mark.slow
def test_everything_at_once_keeps_rows_that_sum_to_1_and_repeats(data):
    stream = training_batches(
        data, PREPROCESS, 13, epochs=2, augmentation=EVERYTHING, token_grid=GRID
    )
    alone = tf.data.Options()
    alone.threading.private_threadpool_size = 1  # one call at a time
    first = list(stream.as_numpy_iterator())
    second = list(stream.with_options(alone).as_numpy_iterator())
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


def test_a_start_within_an_epoch_sees_what_an_undisturbed_run_sees(data):
    """Some steps draw by the key of an image, others by that of a batch."""
    kwargs = {"augmentation": Augmentation(color_jitter=0.3, mixup=0.8), "epochs": 2}
    kwargs |= {"accumulation_steps": 2, "token_grid": None}
    whole = batches(data, 8, **kwargs)
    rest = batches(data, 8, first_epoch=1, first_step=7, **kwargs)
    assert len(whole) == 20 and len(rest) == 3
    for (images, labels), (again, labels_again) in zip(whole[17:], rest, strict=True):
        np.testing.assert_array_equal(images, again)
        np.testing.assert_array_equal(labels, labels_again)


def test_a_start_within_an_epoch_decodes_nothing_of_what_is_done(data):
    """The files of the first batch are no images; a later start never sees them."""
    order = handles(data).ravel()
    stream = data.stream("train").enumerate()
    done = tf.constant(order[:20])

    def damaged(i, example):
        handle = tf.where(tf.reduce_any(i == done), b"no image", example[0])
        return handle, example[1]

    holes = dataclasses.replace(data, stream=lambda part: stream.map(damaged))
    assert len(batches(holes, first_step=1, token_grid=None)) == 1
    with pytest.raises(tf.errors.InvalidArgumentError):
        batches(holes, token_grid=None)


def test_a_step_beyond_the_epoch_is_refused(data):
    with pytest.raises(ValueError, match=r"first_step must be in 0\.\.2, .* got 3"):
        batches(data, first_step=3)


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


def test_the_held_out_batches_are_not_tuned(data):
    """An iterator whose tuner runs is not given back before that has ended: seconds."""
    held_out = validation_batches(data, PREPROCESS, 20)
    assert held_out.options().autotune.enabled is False
    assert sum(len(labels) for _, labels in held_out) == data.sizes["validation"]
