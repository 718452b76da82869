import dataclasses

import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_data import few_scenes, tiny_segmenter, write_images

import training
from keras_vit import CPVT, ViT
from keras_vit.embedding import Preprocess
from training.loss import LOSSES
from training.task import (
    has_own_loss,
    network_of,
    objective,
    preprocess_for,
    run_variables,
    token_grid,
    trainer,
)

NUM_CLASSES = 11


def plain(size=None):
    """A classifier of scenes' classes that takes images of any size, or of one."""
    return CPVT("tiny", image_size=size, embed_dim=24, depth=1, num_classes=NUM_CLASSES)


@pytest.fixture(scope="module")
def pixels():
    """Logits `(3, 5, 4, 6)`, classes 0 to 3 with some ignored, and what is right."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (3, 5, 4, 6)).astype("float32")
    logits[..., 5] -= 50  # never predicted, and in truth never seen
    classes = random.integers(0, 4, (3, 5, 4)).astype("uint8")
    classes[0, :3] = classes[1, 0, 0] = 255
    counts = classes != 255
    truth, predicted = classes[counts], logits.argmax(-1)[counts]
    each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -each[counts][np.arange(counts.sum()), truth]
    pairs = [(truth == i, predicted == i) for i in range(6)]
    ious = [(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()]
    assert len(ious) == 5
    expected = {
        "loss": each.mean(),
        "accuracy": (truth == predicted).mean(),
        "mean_iou": np.mean(ious),
    }
    return logits, classes, expected


@pytest.mark.parametrize("size", [(5, 4), (None, None)])
def test_loss_and_metrics_of_pixels_are_those_of_numpy(pixels, size):
    logits, classes, expected = pixels
    inputs = keras.Input((*size, 6))
    model = keras.Model(inputs, keras.layers.Activation("linear")(inputs))
    loss, metrics = objective(model)
    model.compile(loss=loss, metrics=metrics)
    whole = model.evaluate(logits, classes, batch_size=3, verbose=0, return_dict=True)
    assert whole.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(whole[key], value, rtol=1e-5, err_msg=key)
    parts = model.evaluate(logits, classes, batch_size=2, verbose=0, return_dict=True)
    for key in ("accuracy", "mean_iou"):
        np.testing.assert_allclose(parts[key], expected[key], rtol=1e-5, err_msg=key)


def test_pixels_that_do_not_count_teach_nothing(pixels):
    """A step on them changes nothing; a step that has them is one without them."""
    logits, classes, _ = pixels

    def step(x, y):
        inputs = keras.Input((None, None, 6))
        layer = keras.layers.Dense(6, kernel_initializer="identity")
        model = keras.Model(inputs, layer(inputs))
        loss, metrics = objective(model)
        model.compile(keras.optimizers.SGD(1.0), loss, metrics=metrics)
        model.train_on_batch(x, y)
        return to_numpy(layer.kernel)

    np.testing.assert_array_equal(step(logits, np.full_like(classes, 255)), np.eye(6))
    counts = classes != 255
    without = step(logits[counts][None, None], classes[counts][None, None])
    np.testing.assert_allclose(step(logits, classes), without, atol=1e-5)
    assert np.abs(without - np.eye(6)).max() > 0.01


def test_classes_of_images_are_judged_as_ever(pixels):
    logits, classes, _ = pixels
    model = keras.Sequential([keras.Input((6,)), keras.layers.Activation("linear")])
    loss, metrics = objective(model)
    model.compile(loss=loss, metrics=metrics)
    x, y = logits[2].reshape(-1, 6), classes[2].ravel()
    result = model.evaluate(x, y, verbose=0, return_dict=True)
    assert result.keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(result["accuracy"], (x.argmax(-1) == y).mean())


def test_the_size_is_the_models_or_that_of_the_data_or_what_is_asked():
    scenes = few_scenes()
    images = dataclasses.replace(scenes, image_size=None)
    assert preprocess_for(plain(), scenes).image_size == (64, 64)
    assert preprocess_for(plain(32), scenes).image_size == (32, 32)
    assert preprocess_for(plain((None, 32)), scenes).image_size == (64, 32)
    assert preprocess_for(plain(), images).image_size == (224, 224)
    assert preprocess_for(plain(), scenes, (32, 48)).image_size == (32, 48)
    assert preprocess_for(plain(), scenes, (32, 48)).crop_ratio == 0.875
    with pytest.raises(ValueError, match="of 32 x 32 pixels only, got 32 x 48"):
        preprocess_for(plain(32), scenes, (32, 48))


def test_evaluate_scores_every_held_out_scene_at_any_size():
    model, data = tiny_segmenter(), few_scenes()
    for size in (None, (40, 56)):
        result = training.evaluate(model, data, batch_size=5, image_size=size)
        preprocess = preprocess_for(model, data, size)
        pairs = list(training.validation_batches(data, preprocess, 5))
        assert pairs[0][1].shape[1:] == (size or (64, 64))
        right = [
            to_numpy(model(x.numpy())).argmax(-1) == y.numpy() for x, y in pairs
        ]  # of 5, 5 and 2 scenes
        accuracy = np.concatenate(right).mean()
        np.testing.assert_allclose(result["accuracy"], accuracy, atol=1e-4)


def test_a_model_and_data_that_do_not_fit_are_one_sentence(tmp_path):
    folder = write_images(tmp_path / "images", {"a": 12, "b": 12})
    images, scenes = training.load_data(f"folder:{folder}"), few_scenes()
    recipe = training.RECIPES["digits"].replace(batch_size=4)
    for model, data, sentence in (
        (plain(), scenes, r"logits \(B, H, W, C\) for masks of 'digit_scenes:64', got"),
        (tiny_segmenter(2), images, r"logits \(B, C\) for images of 'folder:"),
        (tiny_segmenter(3), scenes, "one logit for each of the 11 labels .* got 3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            training.fit(lambda model=model: model, data, recipe, tmp_path / "run")
        with pytest.raises(ValueError, match=sentence):
            training.evaluate(model, data)
    with pytest.raises(ValueError, match="of 16 x 16 pixels only, got 32 x 32; one"):
        model = ViT("tiny", image_size=16, patch_size=8, depth=1, num_classes=2)
        training.evaluate(model, images, image_size=(32, 32))


def test_token_labeling_trains_the_network_and_gives_it_back():
    recipe = training.RECIPES["digits_token_labeling"].replace(
        embed_dim=24, depth=1, num_heads=2, dense_weight=0.5, mix_token="unbiased"
    )
    network = recipe.build_model(10)
    model = trainer(network, recipe)
    assert network_of(model) is network and network_of(network) is network
    assert model.labeling.dense_weight == 0.5 and model.mix.sides == "unbiased"
    assert trainer(network, recipe.replace(mix_token=None)).mix is None
    assert trainer(network, recipe.replace(token_labeling=None)) is network


def test_tokens_that_are_labelled_are_those_of_the_model():
    recipe = training.RECIPES["digits_token_labeling"]
    preprocess = Preprocess((48, 30), None, "bilinear")
    network = ViT("tiny", image_size=None, patch_size=8, depth=1, num_classes=3)
    assert token_grid(network, preprocess, recipe) == (6, 4)
    assert token_grid(network, preprocess, recipe.replace(token_labeling=None)) is None


def test_a_model_without_tokens_cannot_have_them_labelled():
    recipe = training.RECIPES["digits_token_labeling"]
    with pytest.raises(ValueError, match=r"for a plain vision transformer .* got '.*"):
        trainer(tiny_segmenter(), recipe)


def test_the_loss_of_a_classifier_is_that_of_the_recipe():
    for name, kind in LOSSES.items():
        assert type(objective(plain(32), name)[0]) is kind
    with pytest.raises(
        ValueError, match="'softmax' for logits of pixels, got 'binary'"
    ):
        objective(tiny_segmenter(), "binary")


def test_a_recipe_with_a_teacher_trains_the_network_by_its_answers(tmp_path):
    teacher = ViT("tiny", image_size=16, patch_size=8, depth=1, num_classes=10)
    teacher.save(tmp_path / "teacher.keras")
    recipe = training.RECIPES["digits"].replace(
        embed_dim=24,
        depth=1,
        loss="binary",
        teaching={
            "teacher": str(tmp_path / "teacher.keras"),
            "distillation": "soft",
            "distillation_weight": 0.25,
            "temperature": 3.0,
        },
    )
    network = recipe.build_model(10)
    model = trainer(network, recipe)
    assert network_of(model) is network and has_own_loss(model)
    loss = model.distilling
    assert (loss.loss, loss.kind) == ("binary", "soft")
    assert (loss.weight, loss.temperature) == (0.25, 3.0)
    assert model.teacher.input_shape == (None, 16, 16, 3)
    kept = run_variables(model)
    assert {id(v) for v in kept} == {id(v) for v in network.variables}
    assert run_variables(network) == network.variables
    with pytest.raises(ValueError, match=r"'digits' needs a teacher: --set teacher="):
        trainer(network, recipe.replace(teacher=None))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"token_labeling": {}, "teaching": {}},
            "token_labeling or teaching; got both",
        ),
        ({"token_labeling": {}, "loss": "sigmoid"}, "with token_labeling .* 'sigmoid'"),
        ({"segmentation": {}, "loss": "binary"}, "or segmentation, got 'binary'"),
        ({"label_smoothing": 0.1, "loss": "binary"}, "must be 0 with loss=.* got 0.1"),
    ],
)
def test_losses_that_do_not_go_together_are_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        training.RECIPES["digits"].replace(**change)
