"""The door for new requests: shut while the server ends, or while its model is changed; those inside may finish.

Only what costs something (POST) stands before it. Cancelling a response and the routes of the admin pass always.
"""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.admin import is_admin_route
from frontend.engine import RETRY_AFTER_S
from frontend.errors import response_of
from shared.errors import Unavailable

log = logging.getLogger("frontend")

LOOK_S = 0.05
DRAINING = "draining"


class Door:
    """`reason` is why it is shut, in a word for /health; empty while it is open."""

    def __init__(self) -> None:
        self.reason = ""
        self.num_inside = 0  # answers that are being written, and responses that are made in the background
        self._refusal = Unavailable("")

    @property
    def is_final(self) -> bool:
        """Shut for the server's end: it never opens again."""
        return self.reason == DRAINING

    def shut(self, reason: str, message: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        if self.is_final:
            return
        self.reason = reason
        self._refusal = Unavailable(message, retry_after_s=retry_after_s)

    def open(self) -> None:
        if not self.is_final:
            self.reason = ""

    def check(self) -> None:
        """Raises Unavailable: it is shut."""
        if self.reason:
            raise self._refusal

    async def wait_empty(self, timeout_s: float) -> bool:
        """Until nobody is inside; False: some still were when the time was over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self.num_inside and loop.time() < deadline:
            await asyncio.sleep(LOOK_S)
        return not self.num_inside

    async def drain(self, timeout_s: float) -> None:
        """For the server's end: let nobody in, and wait for those inside."""
        self.shut(DRAINING, "the server is shutting down: it finishes what it has and takes no new requests")
        log.info("draining: %d requests are being answered", self.num_inside)
        if not await self.wait_empty(timeout_s):
            log.warning("%d requests had not ended after %g s and are given up", self.num_inside, timeout_s)


class Entrance:
    """The door in an ASGI application."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or _is_always_open(scope):
            return await self._app(scope, receive, send)
        try:
            self._door.check()
        except Unavailable as error:
            return await response_of(error, scope)(scope, receive, send)
        self._door.num_inside += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.num_inside -= 1


def _is_always_open(scope: Scope) -> bool:
    return is_admin_route(scope) or scope["path"].endswith("/cancel")
