"""Training batches made by the workers of a tf.data service.

    S = tf.data.experimental.service
    S.DispatchServer(S.DispatcherConfig(port=5000, worker_addresses=["host:5001"]))
    S.WorkerServer(S.WorkerConfig("dispatcher:5000", "host:5001", port=5001))

Which worker answers when is chance, in coordinated reads of the service too: they pass
over one that is not ready. So every worker is a job of its own, in which the others
have nothing to do; it makes each W-th batch, and the batches are taken in turn. A lost
worker is awaited; it begins anew, which ends the reading in an error.

W workers, N batches.
"""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import tensorflow as tf

from training.data import Dataset

ENDLESS = 2**40
LOST = "not the batches that were due"
HINT = tf.data.experimental.service.ShardingPolicy.HINT
OWN = tf.data.experimental.SHARD_HINT


@dataclasses.dataclass(frozen=True)
class DataService:
    """A tf.data service whose workers have all joined: what `connect` returns.

    Args:
        address: Of the dispatcher, `grpc://HOST:PORT`.
        workers: W.
    """

    address: str
    workers: int

    def share(
        self, examples: tf.data.Dataset, batch_size: int, worker: int
    ) -> tf.data.Dataset:
        """The examples of each W-th batch from `worker` on; on other workers none."""
        own = tf.data.Dataset.range(self.workers).shard(OWN, OWN)  # one number
        batches = examples.batch(batch_size, drop_remainder=True)
        batches = batches.shard(self.workers, worker)
        shared = own.filter(lambda number: number == worker)
        return shared.flat_map(lambda number: batches).unbatch()

    def read(
        self, shares: list[tf.data.Dataset], first: int, total: int
    ) -> tf.data.Dataset:
        """Batches in their order, made by the workers.

        Args:
            shares: For each worker (number of the batch, batch), of what `share` gave.
            first: Number of the first batch.
            total: N.

        Returns:
            Dataset of the batches. Reading it ends in an error that `explaining`
            explains if they are others than those.

        Raises:
            ValueError: If the batches need Python functions of this process.
        """
        _check_no_python(shares[0])
        made = tf.data.experimental.service.distribute(HINT, self.address)
        turns = tf.data.Dataset.range(total).map(lambda i: i % self.workers)
        batches = tf.data.Dataset.choose_from_datasets(
            [share.apply(made) for share in shares], turns, stop_on_empty_dataset=True
        )

        def checked(due, numbered):
            number, batch = numbered
            check = tf.debugging.assert_equal(number, due, f"These are {LOST}.")
            with tf.control_dependencies([check]):
                return tf.nest.map_structure(tf.identity, batch)

        batches = batches.enumerate(first).map(checked)
        batches = batches.apply(tf.data.experimental.assert_cardinality(total))
        return batches.filter(lambda *batch: True)  # Keras begins anew where it knows


def connect(address: str, timeout_seconds: float = 60) -> DataService:
    """Find a tf.data service, and wait until all its workers have joined.

    Args:
        address: Of the dispatcher, `grpc://HOST:PORT`.
        timeout_seconds: How long to wait.

    Raises:
        ValueError: If the address is another, or the dispatcher was started without
            `worker_addresses`.
        ConnectionError: If there is no dispatcher, or a worker does not join.
    """
    host, _, port = address.removeprefix("grpc://").rpartition(":")
    if not (address.startswith("grpc://") and host and port.isdecimal()):
        raise ValueError(f"data_service must be grpc://HOST:PORT, got {address!r}.")
    try:
        socket.create_connection((host, int(port)), timeout_seconds).close()
    except OSError as error:
        raise ConnectionError(
            f"data_service={address!r} must be a running tf.data dispatcher, none "
            f"answers there: {error}."
        ) from error
    return DataService(address, _workers(address, timeout_seconds))


@contextlib.contextmanager
def explaining(data: Dataset) -> Iterator[None]:
    """Turn TensorFlow's errors of batches from a service into sentences.

    Raises:
        ValueError: With the files that cannot be decoded.
        ConnectionError: If a worker was lost, or has begun anew.
    """
    try:
        yield
    except tf.errors.OpError as error:
        lost = (tf.errors.UnavailableError, tf.errors.FailedPreconditionError)
        if LOST in str(error) or isinstance(error, lost):
            raise ConnectionError(
                "The tf.data service must keep all its workers, one was lost or "
                "has begun anew. Run the same command again to go on."
            ) from error
        with data.naming_damaged_files():
            raise


def _workers(address, timeout_seconds):
    """Number of workers, all of which have joined."""
    firsts = tf.data.Dataset.range(ENDLESS).shard(OWN, OWN).batch(2).take(1)
    firsts = firsts.apply(tf.data.experimental.service.distribute(HINT, address))
    seen, due, failed = set(), [], []
    end = time.monotonic() + timeout_seconds

    def ask():
        try:
            while time.monotonic() < end and not (due and len(seen) == due[0]):
                for first, second in firsts.as_numpy_iterator():
                    seen.add(int(first))
                    due[:] = [int(second - first)]
                time.sleep(0.2)
        except tf.errors.OpError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # may wait for ever
    asking.start()
    asking.join(timeout_seconds)
    if failed:
        raise ValueError(
            f"The dispatcher of data_service={address!r} must be started with "
            f"worker_addresses, of all its workers; it answers: {failed[0].message}"
        )
    if not due or len(seen) < due[0]:
        raise ConnectionError(
            f"All workers of data_service={address!r} must join within "
            f"{timeout_seconds:g} seconds, got {len(seen)} of {(due or ['some'])[0]}."
        )
    return due[0]


def _check_no_python(batches):
    """Refuse batches that only the process can make that has their functions."""
    graph = tf.raw_ops.DatasetToGraphV2(
        input_dataset=tf.data.experimental.to_variant(batches), external_state_policy=1
    )
    graph = tf.compat.v1.GraphDef.FromString(graph.numpy())
    nodes = [*graph.node, *(x for f in graph.library.function for x in f.node_def)]
    if any("PyFunc" in node.op for node in nodes):
        raise ValueError(
            "A data_service must find the data in files that TensorFlow reads; arrays "
            "and folders of label maps are read by this process. Leave it out."
        )
