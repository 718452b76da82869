"""`keras-vit serve`: TensorFlow Serving's interfaces for a laptop.

The C++ session runs in a process of its own (`export.runtime`); this process speaks
REST and gRPC, merges requests into batches, and looks for new versions. Production is
TensorFlow Serving itself, which loads the same folder.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
from aiohttp import web

from export.server_grpc import add_services
from export.server_metrics import Metrics
from export.server_models import Model
from export.server_rest import SILENT, application
from export.server_service import Limits, Service
from export.session import StatusError

DRAIN_SECONDS = 30.0


class Server:
    """A model served over REST and gRPC.

    Args:
        directory: Folder of versions, or one version.
        name: Name of the model; None for that of the folder.
        host: Address to listen on.
        rest_port: Port of REST; 0 for a free one.
        grpc_port: Port of gRPC; 0 for a free one.
        limits: What a request may cost.

    Attributes:
        rest_port: The port in use, after `start`.
        grpc_port: Likewise.

    Raises:
        FileNotFoundError: If the folder holds no version.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str | None = None,
        host: str = "127.0.0.1",
        rest_port: int = 8501,
        grpc_port: int = 8500,
        limits: Limits | None = None,
    ):
        metrics = Metrics()
        self.model = Model(Path(directory), name, metrics)
        self.service = Service(self.model, metrics, limits or Limits())
        self.host, self.rest_port, self.grpc_port = host, rest_port, grpc_port

    async def start(self) -> None:
        """Load the highest version, then listen.

        Raises:
            ValueError: If the version does not load.
            OSError: If a port cannot be had.
        """
        await self.model.poll()
        if self.model.served is None:
            told = [x.message for x in self.model.states.values()]
            raise ValueError(f"{self.model.directory} does not load: {' '.join(told)}")
        limits = self.service.limits
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # a port in use is an error
                ("grpc.max_receive_message_length", limits.body_bytes),
                ("grpc.max_send_message_length", -1),
            ]
        )
        try:
            self._health = await add_services(self._grpc, self.service)
            self.grpc_port = self._listen_grpc()
            self._rest = web.AppRunner(
                application(self.service),
                handler_cancellation=True,  # a client that is gone is dropped
                shutdown_timeout=DRAIN_SECONDS,
                access_log=None,
                logger=SILENT,
            )
            await self._rest.setup()
            self._site = web.TCPSite(self._rest, self.host, self.rest_port)
            try:
                await self._site.start()
            except OSError as error:
                raise OSError(_in_use(self.host, self.rest_port)) from error
            self.rest_port = self._site._server.sockets[0].getsockname()[1]
            await self._grpc.start()
        except BaseException:
            await self.model.close()
            raise
        self._watching = asyncio.create_task(self.model.watch())

    def _listen_grpc(self) -> int:
        try:
            port = self._grpc.add_insecure_port(f"{self.host}:{self.grpc_port}")
        except RuntimeError:
            port = 0
        if not port:
            raise OSError(_in_use(self.host, self.grpc_port))
        return port

    async def stop(self) -> None:
        """Take nothing new, finish what is in flight, unload."""
        self._watching.cancel()
        await self._health.enter_graceful_shutdown()
        await self._site.stop()
        self.service.draining = True
        await asyncio.gather(self._grpc.stop(DRAIN_SECONDS), self._rest.cleanup())
        with contextlib.suppress(StatusError):
            await self.model.close()


def _in_use(host: str, port: int) -> str:
    return (
        f"{host}:{port} cannot be listened on: another program uses the port, or the "
        "address is not of this machine; choose another."
    )


def serve_until_told(server: Server, announce: Callable[[Server], None]) -> None:
    """Serve until SIGTERM or an interrupt, then end in order.

    Args:
        server: The server.
        announce: Called once it listens.

    Raises:
        ValueError: If the version does not load.
        OSError: If a port cannot be had.
    """

    async def run():
        told = asyncio.Event()
        await server.start()  # until it has begun, a signal ends the process at once
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, told.set)
        announce(server)
        await told.wait()
        await server.stop()

    asyncio.run(run())
