"""The outermost layer: request ids, counters and one log line (at debug) for each request."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from frontend.errors import CLIENT_CLOSED_REQUEST, is_messages_path
from frontend.metrics import HttpMetrics

log = logging.getLogger("frontend")

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})


class Access:
    """Pure ASGI: Starlette's BaseHTTPMiddleware would copy every chunk through a queue of its own."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST  # unless an answer begins
        request_id = scope["request_id"] = _request_id(scope)
        added = [(b"x-request-id", request_id)]
        if is_messages_path(scope["path"]):
            added.append((b"request-id", request_id))  # Anthropic's name

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.observe(method, route, status, seconds)
            log.debug("%s %s %d %.3f s", method, route, status, seconds)


def _request_id(scope: Scope) -> bytes:
    """The client's own x-request-id where it is safe to repeat, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return bytes(value)
    return b"req-" + uuid.uuid4().hex.encode()
