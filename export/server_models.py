"""The versions of a model: found, loaded, switched and unloaded as a server does."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm.auto import tqdm

from export.messages import numpy_dtype, pb
from export.runtime import Runtime, RuntimeCrashError
from export.server_batches import Batcher, BatchingParameters, Tensors
from export.server_metrics import Metrics
from export.session import StatusError
from export.versions import EXTRA, parse_number, versions
from export.warmup import NAME, read_warmup

LOG = logging.getLogger("keras_vit.serve")
LOG.addHandler(logging.NullHandler())  # who serves says where it is written
POLL_SECONDS = 1.0
RETRY_SECONDS = 10.0  # between attempts to load a version that does not load
RUN_SECONDS = 60.0  # a run that takes longer is ended with its process


class Host:
    """A runtime that is started anew when it dies.

    Args:
        directory: The version directory.
        metrics: Where restarts are counted.

    Raises:
        StatusError: If the model does not load.
        RuntimeCrashError: If loading takes the process down.
    """

    def __init__(self, directory: Path, metrics: Metrics):
        self.directory = directory
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
        self._runtime = Runtime(directory)
        self.signatures = self._runtime.signatures

    @property
    def pid(self) -> int:
        """Process with the session."""
        return self._runtime.pid

    async def run(self, signature: str, inputs: Tensors) -> Tensors:
        """Ask the session.

        Raises:
            StatusError: What it says; UNAVAILABLE if its process dies meanwhile.
        """
        ask = functools.partial(self._ask, signature, inputs)
        running = asyncio.get_running_loop().run_in_executor(self._thread, ask)
        try:
            return await asyncio.wait_for(asyncio.shield(running), RUN_SECONDS)
        except TimeoutError:
            self._runtime.kill()  # nothing else can stop a run
            return await running
        finally:
            if not self._runtime.is_alive:
                with contextlib.suppress(RuntimeError):  # the server ends
                    self._thread.submit(self._revive)

    def _ask(self, signature: str, inputs: Tensors) -> Tensors:
        self._revive()  # it may have died while nobody asked
        try:
            return self._runtime.run(signature, **inputs)
        except RuntimeCrashError as error:
            raise StatusError(
                "UNAVAILABLE", f"{error} It is started anew; ask again."
            ) from error

    def _revive(self) -> None:
        if self._runtime.is_alive:
            return
        self._metrics.runtime_restarts.inc()
        self._runtime.close()
        try:
            self._runtime = Runtime(self.directory)
        except (StatusError, RuntimeCrashError) as error:
            raise StatusError(
                "UNAVAILABLE", f"The session could not be started anew: {error}"
            ) from error

    def warm_up(self, only: str | None = None) -> None:
        """Run the records that the artifact ships for this, or those of one signature.

        Raises:
            StatusError: If one fails or the file is damaged, as it would fail the
                load in a server.
        """
        path = self.directory / EXTRA / NAME
        if not path.is_file():
            return
        try:
            records = read_warmup(path)
        except ValueError as error:
            raise StatusError("DATA_LOSS", str(error)) from error
        bar = tqdm(records, "warm-up", unit=" requests", leave=False, disable=None)
        for signature, inputs in bar:
            if only in (None, signature):
                self._ask(signature, inputs)

    def close(self) -> None:
        """End the process."""
        self._thread.shutdown()
        self._runtime.close()


class Served:
    """A version that answers.

    Attributes:
        number: Its number.
        host: Its runtime.
        batcher: What its requests go through.
        signatures: `{signature: {"inputs" | "outputs": {key: {dtype, shape}}}}`.
        born: When it was loaded.
    """

    def __init__(self, model: str, number: int, host: Host, metrics: Metrics):
        self.model, self.number, self.host = model, number, host
        self.signatures = host.signatures
        parameters = BatchingParameters.of_version(host.directory)
        self.batcher = Batcher(host.run, parameters, metrics, model)
        self._users, self._unused = 0, asyncio.Event()
        self._unused.set()

    def __enter__(self) -> "Served":
        """While a request is read and answered: it is not unloaded meanwhile."""
        self._users += 1
        self._unused.clear()
        return self

    def __exit__(self, *exception) -> None:
        self._users -= 1
        if not self._users:
            self._unused.set()

    def signature(self, name: str) -> tuple[str, dict]:
        """A signature by its name; `serving_default` for an empty one.

        Raises:
            StatusError: FAILED_PRECONDITION, if there is none.
        """
        name = name or "serving_default"
        if name not in self.signatures:
            raise StatusError(
                "FAILED_PRECONDITION",
                f'Serving signature name: "{name}" not found in signature def; '
                f"there are {', '.join(self.signatures)}",
            )
        return name, self.signatures[name]

    @functools.cached_property
    def signature_map(self):
        """The signatures as the message that metadata consist of."""
        message = pb.SignatureDefMap()
        for name, description in self.signatures.items():
            signature = message.signature_def[name]
            signature.method_name = "tensorflow/serving/predict"
            for part in ("inputs", "outputs"):
                for key, tensor in description[part].items():
                    info = getattr(signature, part)[key]
                    info.name = tensor["tensor"]
                    info.dtype = pb.DataType.Value(tensor["dtype"])
                    info.tensor_shape.unknown_rank = tensor["shape"] is None
                    for size in tensor["shape"] or ():
                        info.tensor_shape.dim.add(size=size)
        return message

    async def close(self) -> None:
        """Answer all who have asked, then end."""
        await self._unused.wait()
        await self.batcher.close()
        await asyncio.to_thread(self.host.close)


@dataclasses.dataclass
class _State:
    state: str
    code: str = "OK"
    message: str = ""
    since: float = 0.0


class Model:
    """A folder of versions, of which the highest is served.

    Args:
        directory: The folder, or one version directory, which is served alone.
        name: Name of the model; None for that of the folder.
        metrics: Where it is counted.

    Raises:
        FileNotFoundError: If it is neither.
    """

    def __init__(self, directory: Path, name: str | None, metrics: Metrics):
        directory = directory.resolve()
        self._metrics = metrics
        self._alone = None
        if (directory / "saved_model.pb").is_file():
            self._alone = directory
            directory = directory.parent
        self.directory = directory
        self.name = name or directory.name
        self.states: dict[int, _State] = {}
        self._served: dict[int, Served] = {}
        self._closing: set[asyncio.Task] = set()
        if not directory.is_dir() or self._wanted() is None:
            raise FileNotFoundError(
                f"{directory} must be an exported version (with saved_model.pb) or a "
                "folder of versions."
            )

    def find(self, name: str, version: int | None = None) -> Served:
        """The version that answers.

        Raises:
            StatusError: NOT_FOUND, if none of that name and number is served.
        """
        if name == self.name and self._served:
            number = max(self._served) if version is None else version
            if number in self._served:
                return self._served[number]
        asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise StatusError(
            "NOT_FOUND", f"Servable not found for request: {asked}{self._why()}"
        )

    def statuses(self, name: str, version: int | None = None) -> dict[int, _State]:
        """State of each version known.

        Raises:
            StatusError: NOT_FOUND, if there is none.
        """
        found = {k: x for k, x in self.states.items() if version in (None, k)}
        if name != self.name or not found:
            asked = "" if version is None else f" and version {version}"
            raise StatusError(
                "NOT_FOUND", f"Could not find any versions of model {name}{asked}"
            )
        return dict(sorted(found.items(), reverse=True))

    @property
    def served(self) -> Served | None:
        """The version that is asked by default, if any."""
        return self._served[max(self._served)] if self._served else None

    async def watch(self) -> None:
        """Look for versions every second, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                await self.poll()
            except Exception:  # whatever it is, the next version shall be seen
                LOG.exception("Looking for versions failed.")

    async def poll(self) -> None:
        """Serve the highest version; the one before is unloaded after the switch."""
        try:
            found = self._wanted()
        except OSError as error:  # not the same as a folder without versions
            LOG.error("%s cannot be listed: %s", self.directory, error)
            return
        if found is None:
            self._unload(keep=None)
            return
        number, directory = found
        known = self.states.get(number)
        if number not in self._served:
            failed = known is not None and known.code != "OK"
            if failed and time.monotonic() - known.since < RETRY_SECONDS:
                return
            if not await self._load(number, directory):
                return
        self._unload(keep=number)

    async def close(self) -> None:
        """Answer what waits in every version, then unload."""
        self._unload(keep=None)
        await asyncio.gather(*self._closing)

    def _wanted(self) -> tuple[int, Path] | None:
        """Number and folder of the highest version; as a server reads names.

        Raises:
            OSError: If the folder cannot be listed, or is gone.
        """
        if self._alone is not None:
            number = parse_number(self._alone.name)
            number = 1 if number is None else number
            return (number, self._alone) if self._alone.is_dir() else None
        if not self.directory.is_dir():
            raise FileNotFoundError("it is gone")
        found = [x for x in versions(self.directory) if x.path.is_dir()]
        return (found[-1].number, found[-1].path) if found else None

    async def _load(self, number: int, directory: Path) -> bool:
        self.states[number] = _State("LOADING")
        try:
            host = await asyncio.to_thread(Host, directory, self._metrics)
            try:
                # At the beginning nobody wants to wait for the rarer signatures.
                only = None if self._served else "serving_default"
                await asyncio.to_thread(host.warm_up, only)
                served = Served(self.name, number, host, self._metrics)
            except BaseException:
                await asyncio.to_thread(host.close)
                raise
        except (StatusError, RuntimeCrashError, OSError, ValueError) as error:
            code = getattr(error, "code", "INTERNAL")
            message = getattr(error, "message", str(error))
            now = time.monotonic()
            self.states[number] = _State("END", code, message, now)
            LOG.error("Version %d is not served: %s", number, message)
            return False
        self._served[number] = served
        self.states[number] = _State("AVAILABLE")
        LOG.info("Version %d is served.", number)
        return True

    def _unload(self, keep: int | None) -> None:
        for number in [x for x in self._served if x != keep]:
            self.states[number] = _State("UNLOADING")
            closing = asyncio.create_task(self._end(number, self._served.pop(number)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _end(self, number: int, served: Served) -> None:
        await served.close()
        if number not in self._served:
            self.states[number] = _State("END")
            LOG.info("Version %d is unloaded.", number)

    def _why(self) -> str:
        told = [f"{k}: {x.message}" for k, x in self.states.items() if x.message]
        return f" ({'; '.join(told)})" if told else ""


def check_inputs(description: dict, inputs: Tensors) -> int:
    """Compare tensors with a signature before anything else sees them.

    Args:
        description: `{"inputs": {key: {dtype, shape}}}`.
        inputs: The tensors.

    Returns:
        The number of rows.

    Raises:
        StatusError: INVALID_ARGUMENT, if they do not fit.
    """

    def refuse(message):
        raise StatusError("INVALID_ARGUMENT", message)

    expected = description["inputs"]
    if set(inputs) != set(expected):
        refuse(f"inputs must be {sorted(expected)}, got {sorted(inputs)}")
    rows = set()
    for key, array in inputs.items():
        dtype, shape = numpy_dtype(expected[key]["dtype"]), expected[key]["shape"]
        if array.dtype.name != dtype:
            refuse(f"{key} must be of {dtype}, got {array.dtype.name}")
        if array.ndim == 0:
            refuse(f"{key} must have a first dimension of rows, got a scalar")
        if shape is not None and (
            len(shape) != array.ndim
            or any(a not in (-1, b) for a, b in zip(shape, array.shape, strict=True))
        ):
            refuse(f"{key} must have the shape {shape}, got {list(array.shape)}")
        rows.add(len(array))
    if len(rows) != 1:
        refuse(f"inputs must have equal numbers of rows, got {sorted(rows)}")
    return rows.pop()
