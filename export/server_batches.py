"""Requests merged into batches of the allowed sizes, for one session.

The session runs one batch at a time; what arrives meanwhile makes the next one.
"""

import asyncio
import dataclasses
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from export.server_metrics import Metrics
from export.session import StatusError

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """How requests are merged.

    Args:
        allowed: Batch sizes, increasing; smaller batches are padded to the next one.
        timeout: Seconds that a request waits for others at most.
        max_enqueued: Batches that may wait; what comes beyond is refused.
        split: Whether a request above the largest size is split, or refused.
    """

    allowed: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    timeout: float = 0.0
    max_enqueued: int = 100
    split: bool = True

    @classmethod
    def of_version(cls, directory: Path) -> "BatchingParameters":
        """What `batching_params.pbtxt` says; the defaults where there is none.

        Raises:
            ValueError: If it says what cannot be read.
        """
        path = directory / "batching_params.pbtxt"
        if not path.is_file():
            return cls()
        try:
            return cls._of_text(re.sub(r"#.*", "", path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error

    @classmethod
    def _of_text(cls, text: str) -> "BatchingParameters":
        allowed = tuple(map(int, re.findall(r"allowed_batch_sizes\s*:\s*(\d+)", text)))

        def value(name, default):
            found = re.search(name + r"\s*\{\s*value\s*:\s*(\w+)", text)
            return found[1] if found else default

        largest = int(value("max_batch_size", 1000))
        powers = [2**i for i in range(20) if 2**i < largest]
        return cls(
            allowed or (*powers, largest),
            int(value("batch_timeout_micros", 0)) / 1e6,
            int(value("max_enqueued_batches", cls.max_enqueued)),
            value("enable_large_batch_splitting", "false") == "true",
        )


@dataclasses.dataclass
class _Task:
    signature: str
    inputs: Tensors
    rows: int
    future: asyncio.Future
    born: float

    @property
    def key(self) -> tuple:
        """Only tasks of one key can be merged."""
        shapes = [(k, x.dtype.str, x.shape[1:]) for k, x in sorted(self.inputs.items())]
        return (self.signature, *shapes, self.rows == 0)


class Batcher:
    """Merges the requests to one session.

    Args:
        run: Asks the session; called once at a time.
        parameters: How requests are merged.
        metrics: Where batches are counted.
        model: Name of the model in the metrics.
    """

    def __init__(
        self,
        run: Callable[[str, Tensors], Awaitable[Tensors]],
        parameters: BatchingParameters,
        metrics: Metrics,
        model: str,
    ):
        self._run, self._parameters = run, parameters
        self._metrics, self._model = metrics, model
        self._queues: dict[tuple, deque[_Task]] = {}
        self._queued_rows = 0
        self._arrival = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._worker = asyncio.create_task(self._work())

    async def submit(self, signature: str, inputs: Tensors, rows: int) -> Tensors:
        """The outputs of these rows.

        Raises:
            StatusError: What the session says; UNAVAILABLE if the queue is full;
                INVALID_ARGUMENT for more rows than are allowed.
        """
        largest = self._parameters.allowed[-1]
        if rows > largest and not self._parameters.split:
            raise StatusError(
                "INVALID_ARGUMENT",
                f"Task size {rows} is larger than maximum input batch size {largest}",
            )
        if self._queued_rows + rows > self._parameters.max_enqueued * largest:
            raise StatusError(
                "UNAVAILABLE",
                "The batch scheduling queue to which this is sent is full",
            )
        starts = range(0, max(rows, 1), largest)
        futures = [
            self._enqueue(signature, {k: x[i : i + largest] for k, x in inputs.items()})
            for i in starts
        ]
        try:
            parts = await asyncio.gather(*futures)
        finally:
            for future in futures:  # a client that is gone, or another part failed
                future.cancel()
        if len(parts) == 1:
            return parts[0]
        return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}

    async def close(self) -> None:
        """Finish what waits, then end."""
        await self._idle.wait()
        self._worker.cancel()

    def _enqueue(self, signature: str, inputs: Tensors) -> asyncio.Future:
        rows = len(next(iter(inputs.values())))
        future = asyncio.get_running_loop().create_future()
        task = _Task(signature, inputs, rows, future, time.monotonic())
        self._queues.setdefault(task.key, deque()).append(task)
        self._queued_rows += rows
        self._idle.clear()
        self._arrival.set()
        return future

    async def _work(self) -> None:
        while True:
            tasks = await self._next()
            if tasks:
                await self._answer(tasks)
            if not self._queues:
                self._idle.set()
                await self._arrival.wait()

    async def _next(self) -> list[_Task]:
        """The batch that has waited longest, full or over its time."""
        if not self._queues:
            return []
        key = min(self._queues, key=lambda x: self._queues[x][0].born)
        largest = self._parameters.allowed[-1]
        queue = self._queues[key]
        over = queue[0].born + self._parameters.timeout
        while sum(x.rows for x in queue) < largest:
            left = over - time.monotonic()
            if left <= 0:
                break
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), left)
            except TimeoutError:
                break
        tasks, rows = [], 0
        while queue and rows + queue[0].rows <= largest:
            task = queue.popleft()
            self._queued_rows -= task.rows
            if not task.future.done():  # else the client is gone
                tasks.append(task)
                rows += task.rows
        if not queue:
            del self._queues[key]
        self._arrival.clear()
        return tasks

    async def _answer(self, tasks: list[_Task]) -> None:
        """Run a batch; if it fails, each task alone, unless the process died of it."""
        try:
            outputs = await self._run_merged(tasks)
        except StatusError as error:
            if len(tasks) > 1 and error.code != "UNAVAILABLE":
                for task in tasks:
                    await self._answer([task])
                return
            for task in tasks:
                _fail(task, error)
            return
        except Exception as error:
            for task in tasks:
                _fail(task, StatusError("INTERNAL", f"{type(error).__name__}: {error}"))
            return
        start = 0
        for task in tasks:
            stop = start + task.rows
            if not task.future.done():
                task.future.set_result({k: x[start:stop] for k, x in outputs.items()})
            start = stop

    async def _run_merged(self, tasks: list[_Task]) -> Tensors:
        now = time.monotonic()
        for task in tasks:
            latency = self._metrics.queuing_latency.labels(self._model)
            latency.observe((now - task.born) * 1e6)
        rows = sum(task.rows for task in tasks)
        size = next(x for x in self._parameters.allowed if x >= rows) if rows else 0
        merged = {}
        for key in tasks[0].inputs:
            parts = [task.inputs[key] for task in tasks]
            padding = [parts[-1][:1]] * (size - rows)
            merged[key] = np.concatenate(parts + padding) if size > 1 else parts[0]
        self._metrics.processed_batch_size.labels(self._model).observe(size)
        self._metrics.padding_size.labels(self._model).observe(size - rows)
        outputs = await self._run(tasks[0].signature, merged)
        for key, value in outputs.items():
            if value.ndim == 0 or len(value) != size:
                raise StatusError(
                    "FAILED_PRECONDITION",
                    f"Batched output tensor {key} must have {size} rows, "
                    f"got shape {value.shape}",
                )
        return outputs


def _fail(task: _Task, error: StatusError) -> None:
    if not task.future.done():
        task.future.set_exception(error)
