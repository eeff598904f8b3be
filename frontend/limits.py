"""What one key may ask for at a time, and what any request may look like, before an endpoint sees it.

Concurrency counts answers that are being written, so a stream holds its place to its end. The rate is a token bucket:
a key that was quiet may send a minute's worth at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.connection import HEAD_TOO_LARGE, MAX_HEAD_BYTES
from frontend.errors import response_of
from shared.config import Settings
from shared.errors import Busy, HeadTooLarge, InvalidRequest, TandemError

TIMEOUT_HEADER = b"x-request-timeout"
MAX_TIMEOUT_S = 86400.0
RETRY_AFTER_S = 1.0  # a place is free as soon as one of the key's own answers ends


@dataclass
class _Usage:
    num_active: int = 0
    allowance: float = 0.0  # requests that may be sent now
    updated: float = 0.0


class Limits:
    """Applies to POST: those are the requests that cost something."""

    def __init__(self, app: ASGIApp, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._max_active = settings.max_requests_per_key
        self._per_minute = settings.requests_per_minute_per_key
        self._clock = clock
        self._usage: dict[str, _Usage] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            self._check(scope)
            usage = self._enter(scope.get("tenant", "")) if scope["method"] == "POST" else None
        except TandemError as error:
            return await response_of(error, scope)(scope, receive, send)
        try:
            await self._app(scope, receive, send)
        finally:
            if usage is not None:
                usage.num_active -= 1

    @staticmethod
    def _check(scope: Scope) -> None:
        """Raises HeadTooLarge, InvalidRequest."""
        if scope.get(HEAD_TOO_LARGE):
            raise HeadTooLarge(f"the request's line and headers are larger than {MAX_HEAD_BYTES} bytes")
        for name, value in scope["headers"]:
            if name == TIMEOUT_HEADER:
                scope["timeout_s"] = _seconds(value)

    def _enter(self, tenant: str) -> _Usage:
        """Count a request of this key.

        Raises:
            Busy: it has too many running, or sent too many lately.
        """
        now = self._clock()
        usage = self._usage.get(tenant)
        if usage is None:  # there are as many as keys: strangers were sent away before
            usage = self._usage[tenant] = _Usage(allowance=self._per_minute, updated=now)
        if self._max_active and usage.num_active >= self._max_active:
            raise Busy(f"this key has {usage.num_active} requests running, its limit", retry_after_s=RETRY_AFTER_S)
        if self._per_minute:
            per_second = self._per_minute / 60
            usage.allowance = min(self._per_minute, usage.allowance + (now - usage.updated) * per_second)
            usage.updated = now
            if usage.allowance < 1:
                wait_s = (1 - usage.allowance) / per_second
                raise Busy(f"this key may send {self._per_minute} requests a minute", retry_after_s=wait_s)
            usage.allowance -= 1
        usage.num_active += 1
        return usage


def _seconds(value: bytes) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_S:  # nan fails too
        text = f"x-request-timeout: seconds, more than 0 and at most {MAX_TIMEOUT_S:.0f}"
        raise InvalidRequest(text, param="x-request-timeout")
    return seconds
