"""What changes the server for everybody takes the admin key, once there is one."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.auth import given_key
from frontend.errors import response_of
from shared.errors import Forbidden

ADMIN_ROUTES = frozenset({("DELETE", "/v1/cache"), ("POST", "/v1/models/load"), ("POST", "/v1/models/unload")})
ADMIN_TENANT = "admin"


def is_admin_route(scope: Scope) -> bool:
    return (scope["method"], scope["path"].rstrip("/")) in ADMIN_ROUTES


class AdminKey:
    """The admin key opens everything; the routes above open to nothing else.

    Args:
        app: all other requests go on to it.
        inner: behind the check of API keys; where those of the admin go.
    """

    def __init__(self, app: ASGIApp, inner: ASGIApp, key: bytes) -> None:
        self._app, self._inner, self._key = app, inner, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if hmac.compare_digest(given_key(scope), self._key):
            scope["tenant"] = ADMIN_TENANT
            return await self._inner(scope, receive, send)
        if is_admin_route(scope):
            refusal = Forbidden("this changes the server for everybody: it takes the admin key")
            return await response_of(refusal, scope)(scope, receive, send)
        return await self._app(scope, receive, send)
