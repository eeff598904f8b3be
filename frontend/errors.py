"""Errors as HTTP answers, in OpenAI's shape. The status of each code is in shared.errors."""

from __future__ import annotations

import logging
import math

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from frontend.streams import ClientGone
from shared.errors import HTTP_STATUS, ContextLength, NotFound, TandemError

log = logging.getLogger("frontend")

_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 405: "invalid_request_error"}
_TYPES |= {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; only the access counter sees it


def body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> bytes:
    kind = _TYPES.get(status, "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})


def status_of(error: TandemError) -> int:
    return CLIENT_CLOSED_REQUEST if isinstance(error, ClientGone) else HTTP_STATUS.get(error.code, 500)


def body_of(error: TandemError) -> bytes:
    code: str | None = error.code
    if isinstance(error, NotFound) and error.param == "model":
        code = "model_not_found"
    elif status_of(error) == 400 and not isinstance(error, ContextLength):
        code = None  # `type` says invalid_request_error already
    return body(error.message, status_of(error), param=error.param, code=code)


def response_of(error: TandemError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return json_response(body_of(error), status_of(error), headers)


def json_response(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(content, status, headers, media_type="application/json")


async def handle_tandem_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError), "registered for TandemError only"
    return response_of(error)


async def handle_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return json_response(body(message, error.status_code), error.status_code, dict(error.headers or {}))


async def handle_unexpected(_request: Request, error: Exception) -> Response:
    """Our own bug: logged with its trace by uvicorn, told to the client without details."""
    return json_response(body(f"internal error ({type(error).__name__})", 500, code="internal_error"), 500)
