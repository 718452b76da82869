import csv
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import first, to_numpy
from test_data import few_scenes, tiny_segmenter, write_images

import training
from keras_vit import ViT, kernels
from training.loop import precision
from training.progress import Progress

ROOT = Path(__file__).parent.parent

RECIPE = training.RECIPES["digits"].replace(
    image_size=16,
    patch_size=8,
    embed_dim=24,
    depth=2,
    dropout=0.1,
    attention_dropout=0.1,
    epochs=4,
    batch_size=8,
    warmup_epochs=1,
)


def build(recipe=RECIPE):
    return recipe.build_model(2)


def two_classes(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("images"), {"a": 30, "b": 30})
    return training.load_data(f"folder:{folder}")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return two_classes(tmp_path_factory)


def test_a_model_of_another_number_of_classes_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"one logit for each of the 2 labels .* 3"):
        training.fit(lambda: RECIPE.build_model(3), data, RECIPE, tmp_path)


@pytest.mark.first
def test_labels_that_cannot_be_made_leave_no_run_behind(data, tmp_path):
    recipe = RECIPE.replace(token_labeling={"class_labels": "maps"})
    with pytest.raises(ValueError, match="class_labels='maps' needs label maps"):
        training.fit(build, data, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.heavy
@pytest.mark.first
def test_a_batch_in_parts_is_one_update(data, tmp_path):
    recipe = RECIPE.replace(epochs=1, warmup_epochs=0, accumulation_steps=2)
    recipe = recipe.replace(dropout=0.0, attention_dropout=0.0, drop_path_rate=0.0)
    # An affine is drawn for a batch at once; what a tiny gradient is, Adam magnifies.
    recipe = recipe.replace(random_affine=None, optimizer="sgd")
    parts = training.fit(lambda: build(recipe), data, recipe, tmp_path / "parts")
    whole = recipe.replace(accumulation_steps=1)
    whole = training.fit(lambda: build(recipe), data, whole, tmp_path / "whole")
    assert int(parts.optimizer.iterations) == int(whole.optimizer.iterations) == 54 // 8
    for a, b in zip(parts.trainable_variables, whole.trainable_variables, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=1e-5)
    kernel = to_numpy(whole.get_layer("head").kernel)
    assert np.abs(kernel - to_numpy(build().get_layer("head").kernel)).max() > 1e-3


@pytest.mark.heavy
@pytest.mark.first
def test_a_frozen_backbone_is_told_to_no_file(data, tmp_path):
    recipe = RECIPE.replace(frozen="backbone", epochs=1, warmup_epochs=0)
    model = training.fit(build, data, recipe, tmp_path)
    assert len(model.optimizer.variables) < 10
    last = keras.saving.load_model(tmp_path / "last.keras")
    for x in (model, last):
        assert len(x.trainable_variables) == len(x.weights) > 10


@pytest.mark.heavy
@pytest.mark.first
def test_a_run_with_lora_goes_on_and_leaves_a_plain_model(data, tmp_path, monkeypatch):
    recipe = RECIPE.replace(lora_rank=2, epochs=1, warmup_epochs=0)
    recipe = recipe.replace(epochs=2)
    expected = training.fit(build, data, recipe, tmp_path / "whole")
    steps = iter(range(100))
    update = Progress.on_train_batch_end

    def interrupt(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "on_train_batch_end", interrupt)
        training.fit(build, data, recipe, tmp_path / "cut")
    model = training.fit(build, data, recipe, tmp_path / "cut")
    last = keras.saving.load_model(tmp_path / "cut" / "last.keras")
    assert [v.path for v in last.weights] == [v.path for v in build().weights]
    for a, b, c in zip(expected.weights, model.weights, last.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))
        np.testing.assert_allclose(to_numpy(c), to_numpy(b), atol=1e-6)


@pytest.mark.heavy
@pytest.mark.parametrize(
    "policy",
    ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)],
)
def test_mixed_precision_trains_and_the_policy_is_restored(data, tmp_path, policy):
    recipe = RECIPE.replace(precision=policy, epochs=2)
    model = training.fit(build, data, recipe, tmp_path)
    assert keras.config.dtype_policy().name == "float32"
    assert model.get_layer("block0").dtype_policy.name == policy
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    if policy == "mixed_float16":
        optimizer = model.optimizer
        assert isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        again = training.fit(build, data, recipe, tmp_path)
        assert float(again.optimizer.dynamic_scale) == float(optimizer.dynamic_scale)


def test_auto_precision_is_float32_on_a_plain_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "half_precision", lambda: None)
    with precision(RECIPE) as policy:
        assert policy == "float32"
    monkeypatch.setattr(kernels, "half_precision", lambda: "mixed_bfloat16")
    with pytest.raises(KeyError), precision(RECIPE) as policy:
        assert keras.config.dtype_policy().name == policy == "mixed_bfloat16"
        raise KeyError  # restored after an error too
    assert keras.config.dtype_policy().name == "float32"


def test_the_accelerator_decides_the_half_precision():
    assert kernels._half_precision_cuda((9, 0)) == "mixed_bfloat16"
    assert kernels._half_precision_cuda((7, 5)) == "mixed_float16"
    assert kernels.half_precision() in (None, "mixed_bfloat16", "mixed_float16")


SEGMENTATION = training.RECIPES["digits_segmentation"].replace(epochs=3, batch_size=16)


TOKEN_LABELING = training.RECIPES["digits_token_labeling"].replace(
    embed_dim=24,
    depth=1,
    num_heads=2,
    stem_width=4,
    train_images=45,
    mixup=0.2,
    ground_truth=True,
)
TOKEN_LABELING = TOKEN_LABELING.replace(
    batch_size=15, warmup_epochs=0, epochs=3, class_labels="maps"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [first(SEGMENTATION), TOKEN_LABELING],
    ids=["segmentation", "token_labeling"],
)
def test_an_interrupted_run_ends_as_if_undisturbed(tmp_path, monkeypatch, recipe):
    if recipe is SEGMENTATION:
        build, data = tiny_segmenter, few_scenes(size=32)
    else:
        data = training.load_data(recipe.data)

        def build():
            return recipe.build_model(10)

    def fit(run_dir):
        network = training.fit(build, data, recipe, tmp_path / run_dir)
        with np.load(tmp_path / run_dir / "state.npz") as file:
            return network, {key: file[key] for key in file.files if key != "history"}

    _, expected = fit("undisturbed")
    steps = iter(range(1, 1000))
    update = Progress.on_train_batch_end

    def interrupt(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 5:  # of 3 an epoch
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "on_train_batch_end", interrupt)
        fit("interrupted")
    network, final = fit("interrupted")
    assert final.keys() == expected.keys()
    for key, value in final.items():
        np.testing.assert_array_equal(value, expected[key], err_msg=key)
    rows = list(csv.DictReader((tmp_path / "interrupted/history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    own = {"mean_iou", "val_mean_iou"}
    if recipe is TOKEN_LABELING:
        own = {"class_loss", "token_loss", "class_accuracy", "val_token_accuracy"}
    assert {*own, "loss", "val_accuracy", "val_loss"} <= set(rows[0])
    loaded = keras.saving.load_model(tmp_path / "interrupted/last.keras")
    assert loaded.output_shape == network.output_shape
    for ours, theirs in zip(loaded.weights, network.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(ours), to_numpy(theirs))


@pytest.mark.slow
def test_model_fit_of_a_user_is_resumed_too(tmp_path):
    """`compile_model`, `callbacks` and `resume`, without `training.fit`."""
    x = np.random.default_rng(0).uniform(0, 255, (16, 16, 16, 3)).astype("float32")
    y = np.arange(16) % 2

    def start(epochs):
        keras.utils.set_random_seed(1)
        model = build()
        training.compile_model(model, RECIPE, updates_per_epoch=2)
        done = training.resume(model, tmp_path)
        model.fit(
            x,
            y,
            batch_size=8,
            shuffle=False,
            epochs=epochs,
            initial_epoch=done,
            callbacks=training.callbacks(tmp_path, images_per_step=8),
            verbose=0,
        )
        return done, model

    assert start(2)[0] == 0
    done, model = start(3)
    assert done == 2 and int(model.optimizer.iterations) == 6
    other = ViT("tiny", image_size=16, patch_size=8, depth=1, num_classes=2)
    training.compile_model(other, RECIPE, updates_per_epoch=2)
    with pytest.raises(ValueError, match="must hold the variables of this model"):
        training.resume(other, tmp_path)
