"""What both interfaces ask: one model, its limits, its metrics."""

import asyncio
import contextlib
import dataclasses
import time

import numpy as np

from export.messages import pb
from export.server_metrics import Metrics
from export.server_models import Model, Served, check_inputs
from export.session import CODES, StatusError, strings

STATES = pb.ModelVersionStatus.State


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Args:
        body_bytes: Size of a request; of gRPC also of each tensor in it, unpacked.
        rows: Rows of a request.
        requests: Requests at once.
        seconds: Time of a request.
    """

    body_bytes: int = 64 * 2**20
    rows: int = 1024
    requests: int = 512
    seconds: float = 30.0


class Service:
    """A model that answers requests, whatever wire they come over.

    Attributes:
        draining: Whether the server ends: nothing new is taken.
    """

    def __init__(self, model: Model, metrics: Metrics, limits: Limits):
        self.model, self.metrics, self.limits = model, metrics, limits
        self.draining = False
        self._running = 0

    @contextlib.contextmanager
    def request(self, name: str, api: str, entrypoint: str):
        """Count a request and its time, and refuse what is too much at once.

        Raises:
            StatusError: UNAVAILABLE.
        """
        name = name if name == self.model.name else "unknown"  # names are unbounded
        start, status = time.perf_counter(), "OK"
        self._running += 1
        try:
            if self.draining:
                raise StatusError("UNAVAILABLE", "The server is ending.")
            if self._running > self.limits.requests:
                raise StatusError(
                    "UNAVAILABLE",
                    f"More than {self.limits.requests} requests at once.",
                )
            yield
        except StatusError as error:
            status = error.code
            raise
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            status = "CANCELLED" if cancelled else "INTERNAL"
            raise
        finally:
            self._running -= 1
            self.metrics.requests.labels(name, status).inc()
            latency = self.metrics.request_latency.labels(name, api, entrypoint)
            latency.observe((time.perf_counter() - start) * 1e6)

    def find(self, name: str, version: int | None, label: str | None) -> Served:
        """The version that is asked.

        Raises:
            StatusError: NOT_FOUND; INVALID_ARGUMENT for a label.
        """
        self.check_label(label)
        return self.model.find(name, version)

    def check_label(self, label: str | None) -> None:
        """Labels need a server's configuration.

        Raises:
            StatusError: INVALID_ARGUMENT, if one is given.
        """
        if label:
            raise StatusError(
                "INVALID_ARGUMENT", f"Unrecognized servable version label: {label}"
            )

    async def run(self, served: Served, name: str, inputs: dict) -> dict:
        """Outputs of a signature.

        Raises:
            StatusError: If the inputs do not fit, or as the session says.
        """
        rows = check_inputs(served.signatures[name], inputs)
        if rows > self.limits.rows:
            raise StatusError(
                "INVALID_ARGUMENT",
                f"A request must not exceed {self.limits.rows} rows, got {rows}",
            )
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self.limits.seconds):
                return await served.batcher.submit(name, inputs, rows)
        except TimeoutError:
            raise StatusError(
                "DEADLINE_EXCEEDED", f"Timed out after {self.limits.seconds} seconds"
            ) from None
        finally:
            labels = (served.model, "Predict", "TF1")
            latency = self.metrics.runtime_latency.labels(*labels)
            latency.observe((time.perf_counter() - start) * 1e6)

    async def classify(
        self, served: Served, name: str, examples: list[bytes]
    ) -> dict[str, np.ndarray]:
        """Classes and scores of serialized examples."""
        return await self.run(served, name, {"inputs": strings(examples)})


def status_message(states: dict):
    """States of versions as the message of both interfaces."""
    message = pb.GetModelStatusResponse()
    for number, known in states.items():
        status = message.model_version_status.add(
            version=number, state=STATES.Value(known.state)
        )
        code = CODES.index(known.code) if known.code in CODES else 2
        status.status.error_code = code
        status.status.error_message = known.message
    return message
