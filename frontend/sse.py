"""Server-sent events."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from frontend.generation import ClientWatcher
from frontend.streams import ClientGone
from shared.errors import TandemError

log = logging.getLogger("frontend")

DONE = b"data: [DONE]\n\n"
_SEPARATOR = b"\n\n"


def event(data: bytes) -> bytes:
    return b"data: " + data + _SEPARATOR


class EventStream(Response):
    """Sends `events` as they come. An engine error becomes an error event, then comes `ending`.

    Starlette's StreamingResponse starts two tasks and polls for a disconnect; the watcher already does that.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        watcher: ClientWatcher,
        error_event: Callable[[TandemError], bytes],
        ending: bytes,
    ) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._watcher = watcher
        self._error_event = error_event
        self._ending = ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ClientGone:
                return  # nobody listens
            except TandemError as error:
                log.warning("a stream ended with an error: %s", error.message)
                await send(
                    {"type": "http.response.body", "body": self._error_event(error), "more_body": True},
                )
            await send({"type": "http.response.body", "body": self._ending, "more_body": False})
        finally:
            self._watcher.close()
