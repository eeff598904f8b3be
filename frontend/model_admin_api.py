"""POST /v1/models/load and /v1/models/unload, with the admin key: another model, or none, while the server runs."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from frontend.errors import json_response
from frontend.schemas import Body, openapi_body, parse
from frontend.service import Service, read_body, service_of
from shared.errors import NotFound

router = APIRouter()


class LoadModelBody(Body, frozen=True, kw_only=True):
    """`model` and `draft_model` as the settings of these names; the same model again reads its files anew.

    `adapters` are names and places of LoRA adapters, in place of those that are served.
    """

    model: Annotated[str, Meta(min_length=1, max_length=4096)]
    draft_model: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    adapters: Annotated[dict[str, str], Meta(max_length=256)] | None = None
    wait: bool = False  # for the end; otherwise /health tells


class UnloadModelBody(Body, frozen=True, kw_only=True):
    wait: bool = False


@router.post("/v1/models/load", openapi_extra=openapi_body(LoadModelBody))
async def load_model(request: Request) -> Response:
    """202 at once, or with `wait` 200 once the model is served."""
    service = _open_to_admin(request)
    body = parse(await read_body(request), LoadModelBody)
    task = service.model_change.load(body.model, body.draft_model, body.adapters)
    return await _answer(service, task, body.wait)


@router.post("/v1/models/unload", openapi_extra=openapi_body(UnloadModelBody))
async def unload_model(request: Request) -> Response:
    """Ends the processes that hold the model."""
    service = _open_to_admin(request)
    body = parse(await read_body(request) or b"{}", UnloadModelBody)
    return await _answer(service, service.model_change.unload(), body.wait)


def _open_to_admin(request: Request) -> Service:
    """frontend.admin has checked the key, where there is one. Raises NotFound."""
    service = service_of(request)
    if not service.settings.admin_key:
        raise NotFound("models are loaded and unloaded only where TANDEM_ADMIN_KEY is set")
    return service


async def _answer(service: Service, task: asyncio.Task[None], wait: bool) -> Response:
    """Raises TandemError: what was waited for failed. A client that leaves stops nothing."""
    if wait:
        await asyncio.shield(task)
    else:
        task.add_done_callback(_take_error)
        await asyncio.sleep(0)  # it has begun
    content = {"object": "model_change", **(service.model_change.described() or {})}
    return json_response(msgspec.json.encode(content), 200 if wait else 202)


def _take_error(task: asyncio.Task[None]) -> None:
    """It was logged and is told in /health."""
    if not task.cancelled():
        task.exception()
