"""Errors as HTTP answers, in OpenAI's shape; under /v1/messages in Anthropic's. shared.errors has the statuses."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from frontend.streams import ClientGone
from shared.errors import HTTP_STATUS, ContextLength, InvalidRequest, NotFound, PoisonRequest, TandemError

log = logging.getLogger("frontend")

_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 405: "invalid_request_error"}
_TYPES |= {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 413: "invalid_request_error"}
_TYPES |= {
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; only the access counter sees it


def body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> bytes:
    kind = _TYPES.get(status, "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


_MESSAGES_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    413: "request_too_large",
    431: "invalid_request_error",
    504: "timeout_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def is_messages_path(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def request_id_of(scope: Scope) -> str:
    """As the response's header has it; frontend.access set it."""
    request_id = scope.get("request_id", b"")
    assert isinstance(request_id, bytes), "as frontend.access sets it"
    return request_id.decode("ascii")


def messages_body(message: str, status: int, request_id: str, extra: Mapping[str, object] | None = None) -> bytes:
    error = {"type": _MESSAGES_TYPES.get(status, "api_error"), "message": message, **(extra or {})}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})


def messages_body_of(error: TandemError, request_id: str) -> bytes:
    message = error.message
    if isinstance(error, ContextLength) and "prompt is too long" not in message:
        message = f"prompt is too long: {message}"  # the words by which Anthropic's clients know it
    extra: dict[str, object] = {}
    if isinstance(error, ContextLength):
        extra["code"] = error.code
    elif error.param == "thread":  # by this the SDK's tool runners know that they must send all messages themselves
        extra["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return messages_body(message, status_of(error), request_id, extra)


def status_of(error: TandemError) -> int:
    return CLIENT_CLOSED_REQUEST if isinstance(error, ClientGone) else HTTP_STATUS.get(error.code, 500)


def body_of(error: TandemError) -> bytes:
    code: str | None = error.code
    if isinstance(error, NotFound) and error.param == "model":
        code = "model_not_found"
    elif error.code == InvalidRequest.code:
        code = None  # `type` says invalid_request_error already
    return body(error.message, status_of(error), param=error.param, code=code)


def response_of(error: TandemError, scope: Scope) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, PoisonRequest):
        headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients repeat a 500 unless they are told
    is_messages = is_messages_path(scope["path"])
    content = messages_body_of(error, request_id_of(scope)) if is_messages else body_of(error)
    return json_response(content, status_of(error), headers)


def json_response(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")


async def handle_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError), "registered for TandemError only"
    return response_of(error, request.scope)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    message = f"{request.method} {request.url.path}: {error.detail}"
    content = body(message, error.status_code)
    if is_messages_path(request.url.path):
        content = messages_body(message, error.status_code, request_id_of(request.scope))
    return json_response(content, error.status_code, dict(error.headers or {}))


async def handle_unexpected(request: Request, error: Exception) -> Response:
    """Our own bug: logged with its trace by uvicorn, told to the client without details."""
    message = f"internal error ({type(error).__name__})"
    if is_messages_path(request.url.path):
        return json_response(messages_body(message, 500, request_id_of(request.scope)), 500)
    return json_response(body(message, 500, code="internal_error"), 500)
