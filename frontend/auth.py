"""API keys, as `Authorization: Bearer` or, as Anthropic's clients send them, as `x-api-key`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from frontend.errors import body, is_messages_path, json_response, messages_body, request_id_of
from frontend.page.api import is_page_path
from shared.api_keys import ApiKey

OPEN_PATHS = frozenset({"/health"})


class ApiKeys:
    """Lets a request pass when it carries one of `keys`. Sets `scope["tenant"]`, the prefix cache salt of its key."""

    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey]) -> None:
        self._app = app
        self._keys = [(key.key, key.tenant) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or is_page_path(scope["path"]):
            return await self._app(scope, receive, send)
        given = given_key(scope)
        tenant = None
        for key, salt in self._keys:  # every key is compared, so that time tells nothing
            if hmac.compare_digest(given, key):
                tenant = salt
        if tenant is None:
            message = "a valid API key is needed: send the header 'Authorization: Bearer <key>'"
            content = body(message, 401, code="invalid_api_key")
            if is_messages_path(scope["path"]):
                content = messages_body(message, 401, request_id_of(scope))
            response = json_response(content, 401, {"www-authenticate": "Bearer"})
            return await response(scope, receive, send)
        scope["tenant"] = tenant
        return await self._app(scope, receive, send)


def given_key(scope: Scope) -> bytes:
    """The bearer token, or x-api-key where there is none."""
    headers = dict(reversed(scope["headers"]))  # the first of each name counts
    scheme, _, key = bytes(headers.get(b"authorization", b"")).partition(b" ")
    if scheme.lower() == b"bearer":
        return key.strip()
    return bytes(headers.get(b"x-api-key", b"")).strip()
