import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy

import training
from keras_vit import ViT
from keras_vit.embedding import Preprocess
from training import Augmentation, load_data, training_batches
from training.accelerated import STEPS, Augmented, augmented
from training.colors import STEPS as DRAWN
from training.colors import done
from training.data import subset
from training.philox import normal
from training.plan import packed
from training.progress import Progress

SIZE = (20, 28)
B = 9


def pictures():
    """Images of whole numbers: noise, smooth, of few values, flat."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    smooth = 120 + 60 * np.sin(x / 7) * np.cos(y / 5)
    for i in range(B):
        kind = [
            random.integers(0, 256, (*SIZE, 3)),
            np.stack([smooth, smooth / 2 + x, 255 - smooth], -1) - i,
            random.choice([10, 11, 200], (*SIZE, 3)),
            np.full((*SIZE, 3), [7, 90, 255]),
        ][i % 4]
        yield np.clip(kind, 0, 255).astype("uint8")


PICTURES = np.stack(list(pictures()))


def on_device(batch):
    """What the training step sees of a batch, compiled where the backend compiles."""
    model = Augmented(keras.Sequential([keras.layers.Identity()]))
    return model.predict_on_batch(batch)


def check_same(found, expected, most=2e-3):
    """Beyond rounding; where a rounded number decides, a pixel may jump."""
    far = np.abs(found - expected)
    assert found.shape == expected.shape
    assert np.mean(far > most) < 1e-3, (far.max(), np.mean(far > most))


@pytest.mark.parametrize("name", STEPS)
def test_every_step_on_colours_is_that_of_the_pipeline(name):
    first = len(DRAWN["rand_augment"][0]) - 11 + 5 if name == "rand_augment" else 0
    for i in range(len(STEPS[name])):
        amounts = np.linspace(-1, 1, B, dtype="float32")
        if name != "rand_augment":
            amounts = np.linspace(0.1, 2, B, dtype="float32")
        steps = np.stack([np.full(B, first + i, "float32"), amounts], -1)[:, None]
        found = on_device({"images": PICTURES, name: steps})
        expected = [
            done(tf.cast(image, tf.float32), name, tf.constant(own)).numpy()
            for image, own in zip(PICTURES, steps, strict=True)
        ]
        check_same(found, np.stack(expected))
        if i:
            assert np.abs(found - PICTURES).mean() > 1, i


def test_an_image_whose_step_is_none_or_geometric_keeps_its_colours():
    steps = np.array([[[i, 0.9]] for i in (-1, 0, 1, 2, 3, 4, -1, 0, 4)], "float32")
    found = on_device({"images": PICTURES, "rand_augment": steps})
    np.testing.assert_array_equal(found, PICTURES)


def test_noise_is_that_of_tensorflow_to_the_number():
    seeds = [[3, 4], [2**40 + 1, -7], [0, 0]]
    images = tf.zeros((3, 2, 2, 3), tf.uint8)
    plan = {"box": tf.zeros((3, 4), tf.int32), "noise": tf.constant(seeds, tf.int64)}
    state = packed(images, plan, None)["noise"]
    found = to_numpy(normal(keras.ops.convert_to_tensor(state.numpy()), 1001))
    for numbers, seed in zip(found, seeds, strict=True):
        expected = tf.random.stateless_normal((1001,), seed)
        np.testing.assert_allclose(numbers, expected, atol=2e-5)


CHANGES = {
    "nothing": {},
    "flip": {"random_flip": True},
    "rand_augment": {"rand_augment": {"num_ops": 3}, "random_flip": True},
    "three_augment": {"three_augment": True},
    "color_jitter": {"color_jitter": 0.4},
    "affine": {"random_affine": {"rotation_degrees": 30.0, "zoom": 0.2, "shift": 0.2}},
    "erasing": {"random_erasing": 1.0},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
}
CHANGES["everything"] = {
    name: value for change in CHANGES.values() for name, value in change.items()
}


@pytest.fixture(scope="module")
def data():
    return subset(load_data("placed_digits:32"), 36, seed=0)


@pytest.mark.parametrize("name", CHANGES)
def test_a_batch_is_that_of_the_pipeline_on_every_backend(data, name):
    preprocess = Preprocess((32, 32), None, "bilinear")
    plain = Augmentation(**CHANGES[name], label_smoothing=0.1)
    later = dataclasses.replace(plain, on_accelerator=True)
    pairs = [
        training_batches(data, preprocess, 12, epochs=1, augmentation=x)
        for x in (plain, later)
    ]
    most = 2e-2 if "augment" in name or name == "everything" else 2e-3
    for (images, labels), (batch, same) in zip(*pairs, strict=True):
        assert batch["images"].dtype == tf.uint8
        np.testing.assert_array_equal(labels, same)
        found = on_device({key: x.numpy() for key, x in batch.items()})
        check_same(found, images.numpy(), most)


def test_images_without_a_plan_stay_as_they_are():
    images = PICTURES.astype("float32")
    assert augmented(images) is images
    np.testing.assert_array_equal(on_device(images), images)


RECIPE = training.RECIPES["digits"].replace(
    embed_dim=24,
    depth=1,
    num_heads=2,
    epochs=2,
    warmup_epochs=0,
    batch_size=16,
    train_images=64,
    random_affine={"shift": 0.1},
    mixup=0.2,
    random_erasing=0.5,
    on_accelerator=True,
)


@pytest.mark.parametrize(
    "change",
    [{}, pytest.param({"accumulation_steps": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_a_run_is_the_one_of_the_pipeline_and_is_done_once(tmp_path, change):
    digits = load_data("digits")
    recipe = RECIPE.replace(**change, optimizer="sgd", dropout=0.0)

    def fit(name, recipe):
        return training.fit(
            lambda: recipe.build_model(10), digits, recipe, tmp_path / name
        )

    one = fit("device", recipe)
    other = fit("pipeline", recipe.replace(on_accelerator=False))
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=2e-3)
    loaded = keras.saving.load_model(tmp_path / "device/last.keras")
    assert loaded.input_shape == one.input_shape
    again = fit("device", recipe)  # nothing is left to do
    for a, b in zip(one.weights, again.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_token_labeling", "digits_distilled"])
def test_a_run_of_every_trainer_is_that_of_the_pipeline_and_resumes(tmp_path, name):
    """Stopped within an epoch and called again, it ends in the same numbers."""
    recipe = training.RECIPES[name].replace(
        embed_dim=24,
        depth=2,
        num_heads=2,
        epochs=2,
        warmup_epochs=0,
        batch_size=16,
        train_images=64,
        mixup=0.2,
        random_erasing=0.5,
        optimizer="sgd",
    )
    if recipe.teaching is not None:
        teacher = ViT("tiny", depth=1, embed_dim=24, image_size=32, num_classes=10)
        teacher.save(tmp_path / "teacher.keras")
        recipe = recipe.replace(teacher=str(tmp_path / "teacher.keras"))
    data = load_data(recipe.data)

    def fit(folder, on_accelerator=True):
        chosen = recipe.replace(on_accelerator=on_accelerator)
        network = training.fit(
            lambda: chosen.build_model(10), data, chosen, tmp_path / folder
        )
        return [to_numpy(v) for v in network.weights]

    steps = iter(range(1, 1000))
    update = Progress.on_train_batch_end

    def interrupt(self, batch, logs=None):
        update(self, batch, logs)
        if next(steps) == 6:  # of 4 an epoch
            raise KeyboardInterrupt

    whole = fit("whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "on_train_batch_end", interrupt)
        fit("stopped")
    for a, b in zip(fit("stopped"), whole, strict=True):
        np.testing.assert_array_equal(a, b)
    before = [to_numpy(v) for v in recipe.build_model(10).weights]
    change = max(np.abs(a - b).max() for a, b in zip(whole, before, strict=True))
    for a, b in zip(whole, fit("pipeline", False), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-2 * change)


def test_several_devices_do_not_augment():
    from training.distribution import Devices, Placement

    with pytest.raises(ValueError, match="on_accelerator must be False on several"):
        Placement(Devices(2)).check_batches(RECIPE)


def test_on_accelerator_is_true_or_false():
    with pytest.raises(ValueError, match="on_accelerator must be True or False, got 1"):
        Augmentation(on_accelerator=1)
