"""The events of a response that runs without its client, for whoever comes to read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from frontend.streams import ClientGone


class EventLog:
    """Events by sequence number, from 0. Written by one task, read by any number."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.is_closed = False
        self.written: list[bytes] = []
        self.readers: set[Reader] = set()

    def append(self, event: bytes) -> None:
        self.written.append(event)
        self.num_bytes += len(event)
        self._wake()

    def close(self) -> None:
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        for reader in self.readers:
            reader.woken.set()


class Reader:
    """One client that follows a log from a place on."""

    def __init__(self, log: EventLog, start: int) -> None:
        self.woken = asyncio.Event()
        self._log = log
        self._next = start
        self._is_gone = False
        log.readers.add(self)

    async def events(self) -> AsyncIterator[bytes]:
        """Raises ClientGone once abandoned."""
        while True:
            self.woken.clear()
            if self._is_gone:
                raise ClientGone("the client closed the connection")
            lot = b"".join(self._log.written[self._next :])
            self._next = max(self._next, len(self._log.written))
            if lot:
                yield lot
            elif self._log.is_closed:
                return
            else:
                await self.woken.wait()

    def abandon(self) -> None:
        self._is_gone = True
        self.woken.set()

    def disconnect_slow_reader(self, abort: Callable[[], None] | None) -> None:
        """Nothing waits for this client: the events are kept anyway, and it gets the next when it has read the last."""

    def close(self) -> None:
        self._log.readers.discard(self)
