import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from test_data import write_images

import training.runs
from keras_vit import CPVT, ViT, to_checkpoint
from keras_vit.embedding import Preprocess
from keras_vit.model_file import read_model
from training import Augmentation, Distillation, Teaching
from training.distillation import read_teacher
from training.loss import classification_loss
from training.preprocess import resize
from training.progress import Progress

pytestmark = pytest.mark.heavy

SMALL = {"image_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 24}
SMALL |= {"depth": 1, "num_heads": 2}


def images(batch=6, size=16):
    x = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3))
    return x.astype("float32")


CLASSES = np.array([0, 1, 2, 3, 4, 0])
MIXED = np.random.default_rng(1).dirichlet(np.ones(5), 6).astype("float32")


def student(**changes):
    return ViT("deit_tiny_distilled", **{**SMALL, **changes})


def linear():
    """The smallest student with the two heads, for what is no matter of attention."""
    inputs = keras.Input((16, 16, 3))
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.AveragePooling2D(8)(x)
    x = keras.layers.Flatten()(x)
    heads = [
        keras.layers.Dense(5, dtype="float32", name=name)(x)
        for name in ("head", "head_dist")
    ]
    return keras.Model(inputs, keras.layers.Average(dtype="float32")(heads))


def plain(**changes):
    return ViT("deit_tiny", **{**SMALL, **changes})


def teacher(image_size=16, num_classes=5):
    """A small network of convolutions, its answers far apart."""
    return keras.Sequential(
        [
            keras.Input((image_size, image_size, 3)),
            keras.layers.Rescaling(1 / 128, -1),
            keras.layers.Conv2D(8, 4, 4),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.GlobalMaxPooling2D(),
            keras.layers.Dense(num_classes, kernel_initializer="orthogonal"),
        ]
    )


def compiled(trainer, **kwargs):
    trainer.compile(keras.optimizers.AdamW(1e-2), **kwargs)
    return trainer


def weights(model):
    return [to_numpy(variable.value) for variable in model.variables]


@pytest.mark.parametrize(
    "network",
    [
        student,
        pytest.param(lambda: CPVT("tiny_distilled", **SMALL), marks=pytest.mark.slow),
        pytest.param(plain, marks=pytest.mark.heavy),
    ],
    ids=["vit", "cpvt", "without_token"],
)
def test_fit_trains_every_weight_of_the_student_and_none_of_the_teacher(network):
    network, taught_by = network(), teacher()
    trainer = Distillation(network, taught_by, kind="soft", weight=0.9)
    before, fixed = weights(network), weights(taught_by)
    ids = {id(v) for v in network.trainable_variables}
    assert ids == {id(v) for v in trainer.trainable_variables}
    x = images()
    compiled(trainer)
    history = trainer.fit(x, MIXED, batch_size=3, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert set(history) == {
        "loss",
        "accuracy",
        "class_accuracy",
        "distillation_accuracy",
        "teacher_accuracy",
        "class_loss",
        "distillation_loss",
    }
    for old, new in zip(before, weights(network), strict=True):
        assert not np.array_equal(old, new)
    for old, new in zip(fixed, weights(taught_by), strict=True):
        np.testing.assert_array_equal(old, new)
    slots = len(trainer.optimizer.variables)
    assert slots == 2 + 2 * len(network.trainable_variables)


def test_each_head_learns_from_its_own_side_and_the_network_answers_with_both():
    network = student()
    trainer = Distillation(network, teacher())
    outputs = {key: to_numpy(x) for key, x in trainer(images()).items()}
    heads = keras.Model(
        network.input,
        [network.get_layer(name).output for name in ("head", "head_dist")],
    )
    of_class, of_teacher = (to_numpy(x) for x in heads(images()))
    np.testing.assert_allclose(outputs["class"], of_class, atol=1e-6)
    np.testing.assert_allclose(outputs["distillation"], of_teacher, atol=1e-6)
    np.testing.assert_allclose(
        outputs["logits"], (of_class + of_teacher) / 2, atol=1e-6
    )
    assert np.abs(of_class - of_teacher).max() > 0.001


def test_the_weight_says_which_head_learns():
    def step(weight):
        network = linear()
        trainer = Distillation(network, teacher(), weight=weight)
        trainer.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
        names = ("head", "head_dist")
        before = [to_numpy(network.get_layer(name).kernel) for name in names]
        trainer.train_on_batch(images(), CLASSES)
        after = [to_numpy(network.get_layer(name).kernel) for name in names]
        return [not np.array_equal(*pair) for pair in zip(before, after, strict=True)]

    assert step(0.0) == [True, False] and step(1.0) == [False, True]
    assert step(0.5) == [True, True]


def test_without_a_token_one_head_learns_both():
    trainer = Distillation(plain(), teacher())
    outputs = {key: to_numpy(x) for key, x in trainer(images()).items()}
    for name in ("class", "distillation"):
        np.testing.assert_array_equal(outputs[name], outputs["logits"])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid", "binary"])
def test_without_weight_the_first_loss_is_bit_for_bit_that_without_a_teacher(loss):
    x = keras.layers.Flatten()(pixels := keras.Input((16, 16, 3)))
    network = keras.Model(pixels, keras.layers.Dense(5)(x / 255))
    eager = {"run_eagerly": True}  # one program of all may sum in another order
    network.compile(keras.optimizers.SGD(0.0), classification_loss(loss), **eager)
    alone = network.train_on_batch(images(), MIXED)
    trainer = Distillation(network, teacher(), loss=loss, weight=0.0)
    trainer.compile(keras.optimizers.SGD(0.0), **eager)
    found = trainer.train_on_batch(images(), MIXED, return_dict=True)
    np.testing.assert_array_equal(found["loss"], alone)
    np.testing.assert_allclose(found["class_loss"], alone, rtol=1e-6)


def test_evaluation_is_of_what_the_network_answers():
    network = linear()
    trainer = compiled(Distillation(network, teacher()), run_eagerly=True)
    known = {id(v) for v in trainer.non_trainable_variables}
    assert {id(v) for v in trainer.teacher.variables} <= known  # an input, no constant
    found = trainer.evaluate(images(), CLASSES, verbose=0, return_dict=True)
    logits = to_numpy(network(images()))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert found["loss"] == pytest.approx(float(loss(CLASSES, logits)), rel=1e-5)
    right = (logits.argmax(-1) == CLASSES).mean()
    assert found["accuracy"] == pytest.approx(right)
    answers = to_numpy(trainer.teacher(images()))
    right = (answers.argmax(-1) == CLASSES).mean()
    assert found["teacher_accuracy"] == pytest.approx(right)


def test_the_teacher_is_in_inference_mode_while_the_student_is_trained():
    """With its dropout and batch statistics at work it would answer otherwise."""
    taught_by = teacher()
    trainer = Distillation(linear(), taught_by)
    found = to_numpy(trainer(images(), training=True)["teacher"])
    expected = to_numpy(taught_by(images(), training=False))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.first
@pytest.mark.parametrize("size", [24, 10])
def test_a_teacher_of_another_size_sees_what_a_file_of_its_size_would_be(size):
    taught_by = teacher(size)
    trainer = Distillation(linear(), taught_by)
    found = to_numpy(trainer.ask_teacher(images()))
    how = Preprocess((size, size), None, "bicubic")
    resized = np.stack([resize(tf.constant(x), how).numpy() for x in images()])
    np.testing.assert_allclose(found, to_numpy(taught_by(resized)), atol=2e-3)
    assert resized.shape[1:3] == (size, size)


def test_a_teacher_of_any_size_sees_the_images_of_the_student():
    taught_by = teacher(None)
    trainer = Distillation(linear(), taught_by)
    expected = to_numpy(taught_by(images()))
    np.testing.assert_allclose(to_numpy(trainer.ask_teacher(images())), expected, 1e-5)


def test_half_precision_neither_rounds_the_pixels_nor_the_teacher():
    taught_by = teacher()
    expected = to_numpy(taught_by(images()))
    keras.config.set_dtype_policy("mixed_float16")
    trainer = compiled(Distillation(linear(), taught_by, kind="soft"))
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    outputs = trainer(images())
    np.testing.assert_allclose(to_numpy(outputs["teacher"]), expected, atol=1e-5)
    result = trainer.train_on_batch(images(), CLASSES, return_dict=True)
    assert all(np.isfinite(float(value)) for value in result.values())
    for value in outputs.values():
        assert keras.backend.standardize_dtype(value.dtype) == "float32"


def probabilities():
    network = teacher()
    return keras.Sequential([keras.Input((16, 16, 3)), network, keras.layers.Softmax()])


def two_answers():
    network = teacher()
    return keras.Model(network.inputs, [network.outputs[0]] * 2)


@pytest.mark.first
@pytest.mark.parametrize(
    "network, taught_by, message",
    [
        (
            linear,
            lambda: teacher(num_classes=4),
            r"logits \(B, 5\), .*got \(None, 4\)",
        ),
        (linear, probabilities, "must give logits, without a softmax .* 'softmax"),
        (linear, two_answers, "must give one tensor of logits .* got list"),
        (
            linear,
            lambda: keras.Sequential([keras.Input((5,)), keras.layers.Dense(5)]),
            r"must take images \(B, H, W, 3\), got \(None, 5\)",
        ),
        (
            linear,
            lambda: keras.Sequential(
                [keras.Input((16, 16, 3)), keras.layers.Conv2D(5, 1)]
            ),
            r"teacher must give logits \(B, 5\), .* got \(None, 16, 16, 5\)",
        ),
        (
            lambda: keras.Sequential(
                [keras.Input((16, 16, 3)), keras.layers.Conv2D(5, 1)]
            ),
            teacher,
            r"network must give logits \(B, C\), .* got \(None, 16, 16, 5\)",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(network, taught_by, message):
    with pytest.raises(ValueError, match=message):
        Distillation(network(), taught_by())


@pytest.mark.first
def test_a_network_cannot_teach_itself_and_other_losses_are_refused():
    network = linear()
    with pytest.raises(
        ValueError, match=r"another model than the network, .* 'functional"
    ):
        Distillation(network, network)
    assert network.trainable  # it is as it was
    with pytest.raises(ValueError, match=r"its own metrics, .* got loss='mse'"):
        Distillation(network, teacher()).compile(loss="mse")


RECIPE = training.RECIPES["digits"].replace(
    model={"variant": "deit_tiny_distilled", **SMALL, "dropout": 0.1},
    epochs=2,
    batch_size=8,
    warmup_epochs=1,
    augmentation=Augmentation(mixup=0.8),
)
del RECIPE.model["num_classes"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Images of two classes, a teacher of them, and the recipe that says so."""
    folder = tmp_path_factory.mktemp("distillation")
    write_images(folder / "images", {"a": 12, "b": 12})
    teacher(24, 2).save(folder / "teacher.keras")
    data = training.load_data(f"folder:{folder / 'images'}")
    taught = RECIPE.replace(teaching=Teaching(teacher=str(folder / "teacher.keras")))
    return folder, data, taught


def run(work, name, stop=None):
    """A run of the recipe, perhaps stopped after some epochs and called again."""
    folder, data, recipe = work
    with pytest.MonkeyPatch.context() as patch:
        if stop is not None:
            begin = Progress.on_epoch_begin

            def on_epoch_begin(self, epoch, logs=None):
                if epoch == stop:
                    raise KeyboardInterrupt
                begin(self, epoch, logs)

            patch.setattr(Progress, "on_epoch_begin", on_epoch_begin)
            with pytest.raises(KeyboardInterrupt):
                training.fit(lambda: recipe.build_model(2), data, recipe, folder / name)
            patch.undo()
        return training.fit(lambda: recipe.build_model(2), data, recipe, folder / name)


@pytest.mark.slow
@pytest.mark.first
def test_a_run_with_a_teacher_resumes_exactly_and_leaves_the_student_alone(work):
    folder, _, _ = work
    network = run(work, "whole")
    resumed = run(work, "resumed", stop=1)
    with (
        np.load(folder / "whole/state.npz") as a,
        np.load(folder / "resumed/state.npz") as b,
    ):
        assert set(a.files) == set(b.files)
        for key in set(a.files) - {"history"}:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        kept = [key for key in a.files if key.startswith("model/")]
    assert len(kept) == len(network.variables)  # and none of the teacher
    assert [v.shape for v in resumed.variables] == [v.shape for v in network.variables]
    saved = (folder / "whole/last.keras").read_bytes()
    loaded = read_model(folder / "whole/last.keras")
    assert b"teacher" not in saved and "Conv2D" not in str(loaded.get_config())
    x = images(3)
    np.testing.assert_allclose(
        to_numpy(loaded(x)), to_numpy(network(x)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.first
def test_another_teacher_does_not_continue_the_run(work, tmp_path):
    _, data, recipe = work
    own = tmp_path / "teacher.keras"
    teacher(16, 2).save(own)
    recipe = recipe.replace(teacher=str(own), epochs=2)
    preprocess = Preprocess((16, 16), None, "bilinear")
    describe = (data, preprocess, "float32")
    training.runs.describe_run(tmp_path / "run", recipe, *describe)
    training.runs.describe_run(tmp_path / "run", recipe, *describe)
    teacher(16, 2).save(own)
    with pytest.raises(ValueError, match=r"its teacher.sha256 is '.*', now it is '"):
        training.runs.describe_run(tmp_path / "run", recipe, *describe)


@pytest.mark.first
def test_a_teacher_is_read_from_a_file_a_run_or_a_checkpoint(work, tmp_path):
    folder, _, _ = work
    x = images(2, 24)
    expected = to_numpy(keras.saving.load_model(folder / "teacher.keras")(x))
    found = read_teacher(str(folder / "teacher.keras"))
    np.testing.assert_allclose(to_numpy(found(x)), expected, rtol=1e-6)
    network = plain()
    path = tmp_path / "model.safetensors"
    to_checkpoint(network, path)
    found = read_teacher(str(path))
    np.testing.assert_allclose(
        to_numpy(found(images())), to_numpy(network(images())), atol=1e-5
    )
    with pytest.raises(FileNotFoundError, match="no model file"):
        read_teacher(str(tmp_path / "nobody.keras"))
