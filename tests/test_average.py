import csv

import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_data import tiny_segmenter
from test_loop import RECIPE, SEGMENTATION, build, two_classes

import training
from training.checkpoints import Checkpoint
from training.optimizer import weights_average


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory)


@pytest.mark.heavy
@pytest.mark.first
def test_the_average_is_what_is_validated_saved_and_returned(data, tmp_path):
    recipe = RECIPE.replace(ema=0.9, epochs=2, dropout=0.0, attention_dropout=0.0)
    recipe = recipe.replace(drop_path_rate=0.0, depth=1, embed_dim=12)
    recipe = recipe.replace(random_affine=None)
    model = training.fit(lambda: build(recipe), data, recipe, tmp_path / "a")
    returned = [to_numpy(v.value) for v in model.trainable_variables]
    averages = [to_numpy(v.value) for v in weights_average(model.optimizer)]
    last = keras.saving.load_model(tmp_path / "a" / "last.keras")
    found = training.evaluate(last, data, 8)
    row = list(csv.DictReader((tmp_path / "a" / "history.csv").open()))[-1]
    np.testing.assert_allclose(found["accuracy"], float(row["val_accuracy"]), atol=1e-6)
    np.testing.assert_allclose(found["loss"], float(row["val_loss"]), rtol=1e-4)
    for ours, average, saved in zip(
        returned, averages, last.trainable_variables, strict=True
    ):
        np.testing.assert_array_equal(ours, average)
        np.testing.assert_array_equal(ours, to_numpy(saved.value))
    # The weights that go on are those of a run without an average.
    plain = recipe.replace(ema=None)
    plain = training.fit(lambda: build(recipe), data, plain, tmp_path / "b")
    with np.load(tmp_path / "a" / "state.npz") as file:
        kept = [file[f"model/{i:05d}"] for i in range(len(plain.variables))]
    for value, variable in zip(kept, plain.variables, strict=True):
        np.testing.assert_allclose(value, to_numpy(variable.value), atol=1e-6)
    again = training.fit(lambda: build(recipe), data, recipe, tmp_path / "a")
    for value, variable in zip(returned, again.trainable_variables, strict=True):
        np.testing.assert_array_equal(value, to_numpy(variable.value))


@pytest.mark.parametrize("better", ["accuracy", "mean_iou"])
def test_the_best_segmentation_is_that_of_mean_iou(tmp_path, better):
    model = tiny_segmenter()
    checkpoint = Checkpoint(tmp_path)
    training.compile_model(model, SEGMENTATION, updates_per_epoch=1)
    model.optimizer.build(model.trainable_variables)
    checkpoint.set_model(model)
    checkpoint.on_train_begin()
    logs = {"val_accuracy": 0.5, "val_mean_iou": 0.5}
    for epoch in range(2):
        checkpoint.on_epoch_begin(epoch)
        checkpoint.on_epoch_end(epoch, logs)
        logs = {"val_accuracy": 0.4, "val_mean_iou": 0.4, f"val_{better}": 0.9}
        model.get_layer("head").bias.assign(np.ones(11))
    best = keras.saving.load_model(tmp_path / "best.keras")
    bias = to_numpy(best.get_layer("head").bias)
    assert bias.sum() == (11 if better == "mean_iou" else 0)
