import socket

import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from test_damage import RECIPE, build, damage, stop_in_epoch_2
from test_data import write_images

import training
from keras_vit.embedding import Preprocess
from training import Augmentation
from training.data import subset
from training.progress import Progress
from training.service import connect, explaining

pytestmark = pytest.mark.first
service = tf.data.experimental.service
PREPROCESS = Preprocess((16, 16), None, "bilinear")
SEVERAL = Augmentation(
    random_resized_crop={"scale": (0.4, 1.0)},
    random_flip=True,
    mixup=0.8,
    cutmix=1.0,
    repeats=2,
)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Cluster:
    """A dispatcher that waits for workers, of which the last ones have joined."""

    def __init__(self, workers, joined=None):
        ports = [free_port() for _ in range(workers)]
        addresses = [f"localhost:{port}" for port in ports]
        self.dispatcher = service.DispatchServer(
            service.DispatcherConfig(port=0, worker_addresses=addresses)
        )
        self.address = self.dispatcher.target
        self.workers = {port: self.worker(port) for port in ports[::-1][:joined]}

    def worker(self, port):
        dispatcher = self.address.removeprefix("grpc://")
        return service.WorkerServer(
            service.WorkerConfig(dispatcher, f"localhost:{port}", port=port)
        )


@pytest.fixture(scope="module")
def cluster():
    return Cluster(2)


@pytest.fixture(scope="module")
def digits():
    return subset(training.load_data("digits"), 41, seed=0)


def batches(data, service=None, **kwargs):
    kwargs = {"augmentation": SEVERAL, "epochs": 3, **kwargs}
    found = training_batches(data, service, **kwargs)
    return [tf.nest.flatten(batch) for batch in found.as_numpy_iterator()]


def training_batches(data, service, **kwargs):
    return training.training_batches(data, PREPROCESS, 8, service=service, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"first_epoch": 1, "first_step": 3},
        {"first_epoch": 2, "first_step": 4},  # less batches than workers
        {
            "accumulation_steps": 2,
            "part": (1, 2),
            "first_step": 3,
            "augmentation": Augmentation(random_flip=True),
            "class_weights": np.linspace(1, 2, 10, "float32"),
        },
    ],
    ids=["all", "middle", "end", "part"],
)
def test_batches_of_a_service_are_those_without_it(cluster, digits, change):
    expected = batches(digits, **change)
    found = batches(digits, connect(cluster.address), **change)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_label_maps_that_need_no_python_go_to_the_workers(cluster):
    data = subset(training.load_data("placed_digits:16"), 41, seed=0)
    how = {"token_grid": (4, 4), "epochs": 1, "augmentation": None}
    found = batches(data, connect(cluster.address), **how)
    expected = batches(data, **how)
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_a_worker_that_begins_anew_is_noticed(digits):
    """It makes its batches from the first one on, which are not due any more."""
    restarted = Cluster(2)
    stream = training_batches(digits, connect(restarted.address), epochs=40)
    with pytest.raises(ConnectionError, match="must keep all"), explaining(digits):
        for i, _ in enumerate(stream):
            if i == 2:
                port = next(iter(restarted.workers))
                restarted.workers[port]._stop()
                restarted.workers[port] = restarted.worker(port)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images" / "train", {"a": 8, "b": 8})
    write_images(tmp_path / "images" / "validation", {"a": 4, "b": 4})
    return tmp_path / "images"


@pytest.mark.slow
def test_a_run_goes_on_with_a_service_to_the_weights_of_one_without(
    cluster, folder, tmp_path
):
    data = training.load_data(f"folder:{folder}")
    expected = training.fit(build, data, RECIPE, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Progress, "on_epoch_begin", stop_in_epoch_2)
        training.fit(build, data, RECIPE, tmp_path / "other")
    found = training.fit(
        build, data, RECIPE, tmp_path / "other", data_service=cluster.address
    )
    for one, other in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@pytest.mark.slow
def test_a_damaged_image_stops_a_run_with_its_name(cluster, folder, tmp_path):
    damage(folder / "train", ["b/002"])
    data = training.load_data(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"b/002\.png must be a whole JPEG"):
        training.fit(
            build, data, RECIPE, tmp_path / "run", data_service=cluster.address
        )


def test_data_that_this_process_alone_can_read_are_refused(cluster):
    images = np.zeros((40, 8, 8), "uint8")
    data = training.from_arrays((images, np.arange(40) % 2))
    with pytest.raises(ValueError, match="in files that TensorFlow reads; arrays"):
        training_batches(data, connect(cluster.address), epochs=1)


def test_a_service_is_not_asked_to_tell_of_damage(cluster, digits):
    with pytest.raises(ValueError, match="damaged=None"):
        training_batches(digits, connect(cluster.address), epochs=1, damaged=print)


@pytest.mark.parametrize("address", ["localhost:5000", "grpc://localhost", "grpc://:1"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(ValueError, match="must be grpc://HOST:PORT"):
        connect(address)


def test_where_no_dispatcher_answers_one_sentence_says_so():
    with pytest.raises(ConnectionError, match="none answers there"):
        connect(f"grpc://localhost:{free_port()}")


def test_workers_that_do_not_join_are_not_awaited_for_ever():
    missing = Cluster(2, joined=1)
    with pytest.raises(ConnectionError, match="got 1 of 2"):
        connect(missing.address, timeout_seconds=2)


def test_a_dispatcher_that_does_not_know_its_workers_is_refused():
    dispatcher = service.DispatchServer(service.DispatcherConfig(port=0))
    address = dispatcher.target
    worker = service.WorkerServer(service.WorkerConfig(address.split("//")[1]))
    with pytest.raises(ValueError, match="started with worker_addresses"):
        connect(address)
    del worker
