"""uvicorn around the application, stopping within the supervisor's grace."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from types import FrameType

import uvicorn

from frontend.app import create_app
from frontend.connection import Connection
from frontend.service import Service

# supervise.py kills after 4 s; this leaves time for sockets and the interpreter.
GRACEFUL_SHUTDOWN_S = 2


class Server(uvicorn.Server):
    """Serves until told to stop, then ends every live request before it waits for connections to close."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        config = uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            http=type("PatientConnection", (Connection,), {"slow_reader_s": settings.slow_reader_s}),
            ws="none",
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        )
        super().__init__(config)
        self._service = service
        self._engine = service.engine
        self._responses = service.responses
        self._drain: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Unlike uvicorn's, does not raise the signal again afterwards: a stop that was asked for ends with code 0."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def drain(self) -> None:
        """End once all requests have, or after a while; new ones are refused from now on."""
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._drain_and_exit(), name="drain")

    async def _drain_and_exit(self) -> None:
        await self._service.door.drain(self._service.settings.drain_timeout_s)
        self.should_exit = True

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._engine.start()
        if threading.current_thread() is threading.main_thread():  # only there signals can be handled
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.drain)
        self._service.model_change.resume()
        try:
            await super().serve(sockets)
        finally:
            self._engine.stop()  # background responses fail, and are stored so
            await self._responses.close()
            await self._engine.close()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()
        await super().shutdown(sockets)
