"""Bearer API keys."""

from __future__ import annotations

import hashlib
import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.errors import body, json_response

OPEN_PATHS = frozenset({"/health"})


def parse_keys(api_keys: str) -> list[bytes]:
    return [key.strip().encode() for key in api_keys.split(",") if key.strip()]


class ApiKeys:
    """Lets a request pass when it carries one of `keys`. Sets `scope["tenant"]`, the prefix cache salt of its key."""

    def __init__(self, app: ASGIApp, keys: list[bytes]) -> None:
        self._app = app
        self._keys = [(key, hashlib.sha256(key).hexdigest()[:16]) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            return await self._app(scope, receive, send)
        given = _bearer(scope)
        tenant = None
        for key, salt in self._keys:  # every key is compared, so that time tells nothing
            if hmac.compare_digest(given, key):
                tenant = salt
        if tenant is None:
            message = "a valid API key is needed: send the header 'Authorization: Bearer <key>'"
            response = json_response(body(message, 401, code="invalid_api_key"), 401, {"www-authenticate": "Bearer"})
            return await response(scope, receive, send)
        scope["tenant"] = tenant
        return await self._app(scope, receive, send)


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = bytes(value).partition(b" ")
            return key.strip() if scheme.lower() == b"bearer" else b""
    return b""
