import dataclasses

import numpy as np
import pytest
from conftest import to_numpy
from test_data import PREPROCESS, few_scenes
from test_loop import RECIPE as LOOP_RECIPE

import training
from training import Augmentation, from_arrays, training_batches
from training.loss import SoftAccuracy
from training.weights import count_classes, weights_of_classes

RECIPE = LOOP_RECIPE.replace(epochs=1, depth=1, warmup_epochs=0, learning_rate=1e-9)
RECIPE = RECIPE.replace(dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0)
RECIPE = RECIPE.replace(random_affine=None, embed_dim=12, num_heads=2)


def uneven(classes=(18, 6), sides=16):
    """Of the first class three times as many as of the second."""
    labels = np.repeat(np.arange(len(classes)), classes)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), sides, sides))
    pair = images.astype("uint8"), labels
    return from_arrays(pair, pair, labels=("cat", "dog", "eel")[: len(classes)])


@pytest.mark.first
def test_balanced_weights_have_mean_1_and_give_each_class_the_same_part():
    data = uneven()
    weights = weights_of_classes("balanced", data)
    np.testing.assert_allclose(weights, [24 / (2 * 18), 24 / (2 * 6)])
    shown = training_batches(data, PREPROCESS, 24, epochs=1, class_weights=weights)
    ((_, labels, of_images),) = shown
    np.testing.assert_array_equal(of_images, weights[labels])
    assert np.mean(of_images) == pytest.approx(1)
    third = dataclasses.replace(data, labels=("cat", "dog", "eel"))  # no image is one
    np.testing.assert_array_equal(
        weights_of_classes("balanced", third), np.append(weights, np.float32(0))
    )


@pytest.mark.first
def test_weights_by_name_or_one_for_each_class():
    data = uneven()
    np.testing.assert_array_equal(weights_of_classes({"dog": 3}, data), [1, 3])
    np.testing.assert_array_equal(weights_of_classes((0.5, 2), data), [0.5, 2])
    assert weights_of_classes(None, data) is None
    with pytest.raises(ValueError, match=r"got 'dot'. Did you mean 'dog'"):
        weights_of_classes({"dot": 3}, data)
    with pytest.raises(ValueError, match=r"each of the 2 classes of 'arrays', got 3"):
        weights_of_classes((1, 2, 3), data)


@pytest.mark.first
def test_a_mixed_image_weighs_what_its_classes_do_by_their_parts():
    weights = np.array([0.5, 2.0], "float32")
    kwargs = {"class_weights": weights, "augmentation": Augmentation(mixup=1.0)}
    ((_, labels, of_images),) = training_batches(
        uneven(), PREPROCESS, 24, epochs=1, **kwargs
    )
    np.testing.assert_allclose(of_images, labels.numpy() @ weights, rtol=1e-6)
    assert ((of_images.numpy() > 0.55) & (of_images.numpy() < 1.95)).any()


@pytest.mark.slow
@pytest.mark.first
def test_a_pixel_weighs_what_its_class_does_and_nothing_where_there_is_none():
    data = few_scenes()
    shift = Augmentation(random_affine={"shift": 0.3})
    counts = count_classes(data)
    assert counts.sum() == 48 * 64 * 64 and counts.argmax() == 0
    weights = weights_of_classes("balanced", data)
    assert (weights * counts).sum() == pytest.approx(counts.sum(), rel=1e-5)
    batches = training_batches(
        data, PREPROCESS, 4, epochs=1, augmentation=shift, class_weights=weights
    )
    for _, masks, of_pixels in batches.take(1):
        masks = masks.numpy()
        assert (masks == 255).any() and of_pixels.shape == masks.shape
        expected = np.where(masks == 255, 0, weights[np.minimum(masks, 10)])
        np.testing.assert_array_equal(of_pixels, expected)


@pytest.mark.heavy
def test_the_loss_is_weighted_and_the_accuracy_counts_every_image_once(tmp_path):
    """The weights hardly move, so that the model of the end is that of every step."""
    data = uneven()
    recipe = RECIPE.replace(batch_size=24, class_weights={"cat": 0.25, "dog": 3.0})
    model = training.fit(lambda: recipe.build_model(2), data, recipe, tmp_path / "run")
    history = np.genfromtxt(tmp_path / "run" / "history.csv", delimiter=",", names=True)
    ((images, labels),) = training_batches(data, PREPROCESS, 24, epochs=1)
    logits = to_numpy(model(images.numpy())).astype("float64")
    labels = labels.numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    of_images = -log_probabilities[np.arange(24), labels]
    weights = np.array([0.25, 3.0])[labels]
    assert history["loss"] == pytest.approx((of_images * weights).mean(), abs=1e-3)
    assert history["val_loss"] == pytest.approx(of_images.mean(), abs=1e-3)
    right = (logits.argmax(-1) == labels).mean()
    assert history["accuracy"] == history["val_accuracy"] == pytest.approx(right)
    metric = SoftAccuracy()  # which would tell another accuracy
    metric.update_state(labels, logits.astype("float32"), weights.astype("float32"))
    assert abs(float(metric.result()) - right) > 0.02


@pytest.mark.slow
def test_a_batch_in_parts_is_weighted_as_the_whole(tmp_path):
    data = uneven()
    recipe = RECIPE.replace(batch_size=24, class_weights="balanced", optimizer="sgd")
    recipe = recipe.replace(learning_rate=0.1, random_affine=None, precision="float32")
    kernels = []
    for steps in (1, 2):
        change = recipe.replace(accumulation_steps=steps)
        run = tmp_path / str(steps)
        model = training.fit(lambda: recipe.build_model(2), data, change, run)
        kernels.append(to_numpy(model.get_layer("head").kernel))
    np.testing.assert_allclose(*kernels, atol=1e-5)


@pytest.mark.first
@pytest.mark.parametrize(
    "weights",
    ["even", {"a": -1.0}, (0, 0), (), (True,), 3, {"a": "b"}],
)
def test_what_are_no_weights_of_classes_is_refused(weights):
    with pytest.raises(ValueError, match=r"class_weights must be 'balanced', a number"):
        RECIPE.replace(class_weights=weights)


@pytest.mark.first
def test_what_has_a_loss_of_parts_takes_no_weights_of_classes():
    for part in ("token_labeling", "teaching"):
        with pytest.raises(ValueError, match=f"class_weights must be None with {part}"):
            RECIPE.replace(class_weights="balanced", **{part: {}})
