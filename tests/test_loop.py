import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_data import few_scenes, tiny_segmenter, write_images

import training
from keras_vit import ViT, kernels
from training.loop import Checkpoint, Progress, precision

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


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("images"), {"a": 30, "b": 30})
    return training.load_data(f"folder:{folder}")


def state(model):
    return {
        f"{i} {v.path}": to_numpy(v.value)
        for i, v in enumerate([*model.variables, *model.optimizer.variables])
    }


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return run_dir, state(training.fit(build, data, RECIPE, run_dir))


def test_a_run_directory_says_everything(data, undisturbed):
    run_dir, _ = undisturbed
    names = sorted(path.name for path in run_dir.iterdir())
    assert names == ["best.keras", "history.csv", "last.keras", "run.json", "state.npz"]
    run = json.loads((run_dir / "run.json").read_text())
    assert run["recipe"]["learning_rate"] == RECIPE.learning_rate
    assert run["recipe"]["seed"] == 0 and run["labels"] == ["a", "b"]
    assert run["data"]["fingerprint"] == data.fingerprint
    assert run["backend"] == keras.backend.backend()
    assert {"keras", "tensorflow", "numpy", "python"} <= set(run["versions"])
    assert run["preprocess"]["image_size"] == [16, 16]
    rows = list(csv.DictReader((run_dir / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "seconds"} <= set(rows[0])


def test_last_model_is_the_one_that_was_returned(undisturbed):
    run_dir, final = undisturbed
    last = keras.saving.load_model(run_dir / "last.keras")
    kernel = next(x for key, x in final.items() if key.endswith("head/kernel"))
    np.testing.assert_array_equal(to_numpy(last.get_layer("head").kernel), kernel)
    assert getattr(last, "optimizer", None) is None


KILLED = """
import os, signal, sys
import training
from training import loop
from test_loop import RECIPE, build

when, steps = sys.argv[3], iter(range(1, 1000))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
if when == "training":  # in the middle of the third epoch
    update = loop.Progress.on_train_batch_end
    def on_train_batch_end(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 16:
            die()
    loop.Progress.on_train_batch_end = on_train_batch_end
else:  # while the state of the second epoch is written
    savez = loop.np.savez
    def half(path, **arrays):
        savez(path, **arrays)
        if next(steps) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            die()
    loop.np.savez = half
training.fit(build, training.load_data(sys.argv[1]), RECIPE, sys.argv[2])
"""


@pytest.mark.parametrize(
    "when, done",
    [("training", 2), pytest.param("writing", 1, marks=pytest.mark.slow)],
)
def test_killed_and_run_again_it_ends_as_if_undisturbed(
    data, undisturbed, tmp_path, when, done
):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run_dir = tmp_path / "run"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, data.name, str(run_dir), when],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    with np.load(run_dir / "state.npz") as file:
        assert len(json.loads(str(file["history"]))) == done
    model = training.fit(build, data, RECIPE, run_dir)
    assert int(model.optimizer.iterations) == 4 * (54 // 8)
    final = state(model)
    assert len(final) == len(undisturbed[1])
    seeds = [key for key in final if "seed_generator" in key]
    assert len(seeds) >= 8
    for (key, value), expected in zip(
        final.items(), undisturbed[1].values(), strict=True
    ):
        np.testing.assert_array_equal(value, expected, err_msg=key)
    rows = list(csv.DictReader((run_dir / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]


def test_a_finished_run_is_not_trained_again(data, undisturbed):
    run_dir, final = undisturbed
    before = (run_dir / "state.npz").stat().st_mtime_ns
    again = state(training.fit(build, data, RECIPE, run_dir))
    assert (run_dir / "state.npz").stat().st_mtime_ns == before
    for value, expected in zip(again.values(), final.values(), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_another_recipe_does_not_continue_the_run(data, undisturbed):
    other = RECIPE.replace(learning_rate=0.5)
    with pytest.raises(ValueError, match=r"its recipe.learning_rate is 0.002, now"):
        training.fit(build, data, other, undisturbed[0])


@pytest.mark.heavy
@pytest.mark.parametrize("size", [0, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_truncated_state_is_one_sentence(data, tmp_path, size):
    recipe = RECIPE.replace(epochs=2)
    training.fit(build, data, recipe, tmp_path)
    os.truncate(tmp_path / "state.npz", size)
    with pytest.raises(ValueError, match=r"state.npz is damaged .* Delete it to start"):
        training.fit(build, data, recipe, tmp_path)


def test_a_model_of_another_number_of_classes_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match=r"one logit for each of the 2 labels .* 3"):
        training.fit(lambda: RECIPE.build_model(3), data, RECIPE, tmp_path)


def test_labels_that_cannot_be_made_leave_no_run_behind(data, tmp_path):
    recipe = RECIPE.replace(token_labeling={"class_labels": "maps"})
    with pytest.raises(ValueError, match="class_labels='maps' needs label maps"):
        training.fit(build, data, recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_named(tmp_path):
    folder = write_images(tmp_path / "images", {"a": 30, "b": 30})
    (folder / "b" / "007.png").write_bytes(b"not an image")
    broken = training.load_data(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"b/007.png must be a whole JPEG"):
        training.fit(build, broken, RECIPE, tmp_path / "run")


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
    [SEGMENTATION, TOKEN_LABELING],
    ids=lambda recipe: recipe.name,
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


@pytest.mark.parametrize("better", ["accuracy", "mean_iou"])
def test_the_best_segmentation_is_that_of_mean_iou(tmp_path, better):
    model = tiny_segmenter()
    checkpoint = Checkpoint(tmp_path)
    training.compile_model(model, SEGMENTATION, steps_per_epoch=1)
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


@pytest.mark.heavy
def test_model_fit_of_a_user_is_resumed_too(tmp_path):
    """`compile_model`, `callbacks` and `resume`, without `training.fit`."""
    x = np.random.default_rng(0).uniform(0, 255, (16, 16, 16, 3)).astype("float32")
    y = np.arange(16) % 2

    def start(epochs):
        keras.utils.set_random_seed(1)
        model = build()
        training.compile_model(model, RECIPE, steps_per_epoch=2)
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
    training.compile_model(other, RECIPE, steps_per_epoch=2)
    with pytest.raises(ValueError, match="must hold the variables of this model"):
        training.resume(other, tmp_path)
