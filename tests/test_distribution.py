import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_data import write_images

import training
from keras_vit.embedding import Preprocess
from training.distribution import Devices, Placement, distributed, parse_devices
from training.sharding import filled, part_of, rows

ROOT = Path(__file__).parent.parent
RECIPE = training.RECIPES["digits"].replace(
    image_size=16,
    patch_size=8,
    embed_dim=24,
    depth=1,
    drop_path_rate=0.0,
    epochs=2,
    batch_size=16,
    warmup_epochs=1,
    random_flip=True,
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    clip_norm=0.05,  # far below the norm of any gradient
)

CHILD = """
import json, sys
import keras
import training
from test_distribution import RECIPE
from training import loop
from training.distribution import parse_devices

data, run_dir, runs, changes = json.loads(sys.argv[1])
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    cpu, four = tf.config.list_physical_devices("CPU")[0], 4
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * four
    )
data, recipe = training.load_data(data), RECIPE.replace(**changes)
on_epoch_end = loop.Progress.on_epoch_end

def stop(self, epoch, logs=None):
    raise KeyboardInterrupt

for devices in runs:  # "4 then 1": an epoch on four devices, the rest on one
    steps = [parse_devices(x) for x in devices.split(" then ")]
    build = lambda: recipe.build_model(len(data.labels))
    while steps:
        loop.Progress.on_epoch_end = stop if len(steps) > 1 else on_epoch_end
        try:
            where = f"{run_dir}/{devices}"
            network = training.fit(build, data, recipe, where, steps.pop(0))
        except KeyboardInterrupt:
            continue
    kernel = network.get_layer("block0").mlp.expand.kernel.value
    if hasattr(kernel, "sharding"):
        shape = kernel.sharding.shard_shape(kernel.shape)
        print("expand", devices, shape[1], "of", kernel.shape[1])
"""


def start(backend, folder, run_dir, runs, changes=None, **environment):
    arguments = json.dumps([f"folder:{folder}", str(run_dir), runs, changes or {}])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, arguments],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of code that runs a few times
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(child):
    out, errors = child.communicate(timeout=900)
    assert child.returncode == 0, errors[-3000:]
    return out


def history(run_dir):
    with np.load(run_dir / "state.npz") as file:
        return json.loads(str(file["history"]))


def check_same_curves(one, other):
    one, other = history(one), history(other)
    assert len(one) == len(other) == RECIPE.epochs
    assert abs(one[0]["val_loss"] - one[1]["val_loss"]) > 1e-3  # something is learnt
    for row, expected in zip(other, one, strict=True):
        for key in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert row[key] == pytest.approx(expected[key], abs=1e-4), key


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """93 images to train, 10 to validate: no multiple of 4, in one batch."""
    folder = tmp_path_factory.mktemp("images")
    return write_images(folder, {"a": 31, "b": 30, "c": 42})


FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


@pytest.fixture(scope="module")
def one_jax_device(folder, tmp_path_factory):
    pytest.importorskip("jax")
    run_dir = tmp_path_factory.mktemp("one")
    finish(start("jax", folder, run_dir, ["1"]))
    return run_dir / "1"


@pytest.mark.slow
def test_on_jax_copies_and_parts_of_a_model_learn_as_one_device(
    folder, one_jax_device, tmp_path
):
    runs = ["4", "2x2", "2x2 then 1"]
    out = finish(start("jax", folder, tmp_path, runs, **FOUR))
    for run in runs:
        check_same_curves(one_jax_device, tmp_path / run)
    assert "expand 4 96 of 96" in out  # the copies are whole
    assert "expand 2x2 48 of 96" in out
    run = json.loads((tmp_path / "2x2" / "run.json").read_text())
    assert run["devices"] == {"data": 2, "model": 2} and run["processes"] == 1
    with np.load(tmp_path / "2x2" / "state.npz") as state:
        shapes = {key: x.shape for key, x in state.items()}
    with np.load(one_jax_device / "state.npz") as state:
        assert shapes == {key: x.shape for key, x in state.items()}
    last = keras.saving.load_model(tmp_path / "2x2" / "last.keras")
    assert last.get_layer("block0").mlp.expand.kernel.shape == (24, 96)


@pytest.mark.slow
def test_on_jax_random_layers_average_and_accumulation_are_those_of_one_device(
    folder, tmp_path
):
    pytest.importorskip("jax")
    changes = {
        "drop_path_rate": 0.3,
        "dropout": 0.1,
        "ema": 0.9,
        "accumulation_steps": 2,
        "batch_size": 32,
    }
    finish(start("jax", folder, tmp_path, ["1", "4"], changes, **FOUR))
    check_same_curves(tmp_path / "1", tmp_path / "4")


@pytest.mark.slow
def test_two_jax_processes_learn_as_one_device(folder, one_jax_device, tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    common = {
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    }
    children = [
        start(
            "jax",
            folder,
            tmp_path,
            ["all"],
            **common,
            KERAS_DISTRIBUTION_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]
    for child in children:
        finish(child)
    check_same_curves(one_jax_device, tmp_path / "all")
    run = json.loads((tmp_path / "all" / "run.json").read_text())
    assert run["devices"] == {"data": 2, "model": 1} and run["processes"] == 2


@pytest.mark.slow
def test_four_tensorflow_devices_learn_as_one(folder, tmp_path):
    finish(start("tensorflow", folder, tmp_path, ["1", "4"]))
    check_same_curves(tmp_path / "1", tmp_path / "4")


@pytest.mark.parametrize("mixes", [False, True])
def test_processes_have_all_rows_once_and_partners_together(mixes):
    parts = [rows(24, (p, 3), mixes) for p in range(3)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(24))
    for part in parts:
        assert len(part) == 8 and (np.diff(part) > 0).all()
        if mixes:
            np.testing.assert_array_equal(23 - part[::-1], part)
        else:
            assert part[-1] - part[0] == 7


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_processes_together_see_the_batches_of_one(folder, mixup):
    data = training.load_data(f"folder:{folder}")
    preprocess = Preprocess((16, 16), None, "bilinear")
    augmentation = training.Augmentation(
        random_resized_crop={},
        random_flip=True,
        rand_augment={"num_ops": 2},
        random_affine={"rotation_degrees": 10.0},
        random_erasing=0.5,
        mixup=mixup,
        cutmix=mixup,
    )

    def batches(part):
        kwargs = {"epochs": 1, "augmentation": augmentation, "part": part}
        found = training.training_batches(data, preprocess, 16, **kwargs)
        return list(found.as_numpy_iterator())

    whole, *parts = (batches(part) for part in [(0, 1), (0, 2), (1, 2)])
    for p, part in enumerate(parts):
        own = rows(16, (p, 2), mixup > 0)
        for expected, got in zip(whole, part, strict=True):
            for one, other in zip(expected, got, strict=True):
                np.testing.assert_allclose(other, one[own], atol=1e-4)


def test_what_fills_a_batch_changes_no_mean():
    values = np.arange(1.0, 11.0, dtype="float32")  # 10 of them, in batches of 8
    batches = tf.data.Dataset.from_tensor_slices((values, values)).batch(8)
    loss, seen, weight_of_values = [], 0, 0.0
    for images, labels, weights in filled(batches, 10, 8, 4, masks=False):
        assert len(images) % 4 == 0
        loss.append(float(tf.reduce_sum(labels * weights)))
        seen += len(images)
        weight_of_values += float(tf.reduce_sum(weights))
    assert seen == 12
    assert sum(loss) / seen == pytest.approx(values.mean())  # as Keras sums a loss
    assert sum(loss) / weight_of_values == pytest.approx(values.mean())  # a metric


def test_masks_that_fill_a_batch_are_of_no_class():
    images = np.zeros((10, 2, 2, 3), "float32")
    masks = np.arange(40, dtype="uint8").reshape(10, 2, 2)
    batches = tf.data.Dataset.from_tensor_slices((images, masks)).batch(8)
    full, last = filled(batches, 10, 8, 4, masks=True)
    np.testing.assert_array_equal(last[1], [*masks[8:], *np.full((2, 2, 2), 255)])
    np.testing.assert_allclose(full[2], np.full((8, 1, 1), 12 / 10), rtol=1e-6)
    np.testing.assert_allclose(last[2], np.full((4, 1, 1), 2 / 4 * 12 / 10), rtol=1e-6)


def test_processes_share_a_validation_batch():
    batches = tf.data.Dataset.from_tensors((np.arange(8), np.arange(8)))
    for process in range(2):
        ((images, _),) = part_of(batches, (process, 2))
        np.testing.assert_array_equal(images, np.arange(4) + 4 * process)


def test_text_to_devices():
    assert [parse_devices(x) for x in (None, "all", "4")] == [None, "all", 4]
    assert parse_devices("4x2") == Devices(data=4, model=2)
    for text in ("", "0", "2x", "2x2x2", "-1", "gpu"):
        with pytest.raises(ValueError, match="must be all, a number, or DATAxMODEL"):
            parse_devices(text)


def test_a_batch_that_devices_cannot_share_names_the_nearest():
    recipe = RECIPE.replace(batch_size=30, mixup=0.0, cutmix=0.0)
    Placement(Devices(3)).check_batches(recipe)
    with pytest.raises(ValueError, match=r"multiple of 4 .* got 30; the nearest is 32"):
        Placement(Devices(4, 2)).check_batches(recipe)
    mixed = RECIPE.replace(batch_size=30)
    with pytest.raises(ValueError, match=r"of 4 \(2 devices, mixed in pairs .* is 32"):
        Placement(Devices(2), 0, 2).check_batches(mixed)
    if keras.backend.backend() != "tensorflow":
        twice = recipe.replace(accumulation_steps=2)
        with pytest.raises(ValueError, match=r"of 4 .*accumulation_steps=2.* is 32"):
            Placement(Devices(2)).check_batches(twice)


@pytest.mark.parametrize(
    "devices, rule",
    [
        (0, "data must be a positive int, got 0"),
        (True, "devices must be 'all', a number, Devices or None, got True"),
        ("two", "devices must be 'all', a number, Devices or None, got 'two'"),
        (1000, "devices must be "),
    ],
)
def test_devices_that_there_are_not_are_refused(devices, rule):
    with pytest.raises(ValueError, match=rule), distributed(devices):
        pass


def test_what_a_backend_has_not_is_refused(monkeypatch):
    if keras.backend.backend() == "torch":
        with pytest.raises(ValueError, match=r"1 or None on torch, .* got 2"):
            distributed(2).__enter__()
    if keras.backend.backend() == "tensorflow":
        if len(keras.distribution.list_devices()) > 1:
            with pytest.raises(ValueError, match="model must be 1 on tensorflow"):
                distributed(Devices(1, 2)).__enter__()
        cluster = {"cluster": {"worker": ["one:1", "two:1"]}}
        monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
        with pytest.raises(ValueError, match=r"TF_CONFIG tells of 2 .*=jax trains in"):
            distributed().__enter__()


def test_one_device_asked_for_is_one_device():
    with distributed(1) as placement:
        assert placement.devices == Devices(1) and placement.is_chief
        assert keras.distribution.distribution() is None
