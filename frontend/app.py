"""The HTTP application: routes, error shapes, middleware."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from frontend import (
    cache_api,
    chat,
    completions,
    embeddings_api,
    errors,
    health,
    messages_api,
    metrics,
    model_admin_api,
    models_api,
    tokenize_api,
)
from frontend.access import Access
from frontend.admin import AdminKey
from frontend.auth import ApiKeys
from frontend.drain import Entrance
from frontend.embeddings_api import EmbeddingsBody
from frontend.limits import Limits
from frontend.messages_schemas import CountTokensBody, MessagesBody
from frontend.metrics import HttpMetrics
from frontend.model_admin_api import LoadModelBody, UnloadModelBody
from frontend.page.api import page_router
from frontend.responses import api as responses_api
from frontend.responses.schemas import CompactBody, InputTokensBody, ResponsesBody
from frontend.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, openapi_components
from frontend.service import Service
from shared.api_keys import load_keys
from shared.errors import TandemError

_BODIES = (
    ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, MessagesBody, CountTokensBody,
    ResponsesBody, CompactBody, InputTokensBody, EmbeddingsBody, LoadModelBody, UnloadModelBody,
)  # fmt: skip


def create_app(service: Service) -> ASGIApp:
    app = FastAPI(
        title="Tandem",
        description="OpenAI-compatible inference on MLX.",
        docs_url=None,  # these pages load scripts from other hosts
        redoc_url=None,
        exception_handlers={
            TandemError: errors.handle_tandem_error,
            HTTPException: errors.handle_http_exception,
            Exception: errors.handle_unexpected,
        },
    )
    app.state.service = service
    app.state.metrics = HttpMetrics()
    for module in (
        chat,
        completions,
        messages_api,
        responses_api,
        embeddings_api,
        models_api,
        model_admin_api,
        tokenize_api,
        health,
        metrics,
        cache_api,
    ):
        app.include_router(module.router)
    if service.settings.ui:
        app.include_router(page_router())
    plain_openapi = app.openapi

    def openapi() -> dict[str, Any]:
        page = plain_openapi()
        page.setdefault("components", {}).setdefault("schemas", {}).update(openapi_components(_BODIES))
        return page

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the page
    limited = Entrance(Limits(app, service.settings), service.door)
    keys = load_keys(service.settings)
    guarded: ASGIApp = ApiKeys(limited, keys) if keys else limited
    if service.settings.admin_key:
        guarded = AdminKey(guarded, limited, service.settings.admin_key.encode())
    if service.tracing is not None:
        guarded = service.tracing.around(guarded)
    return Access(guarded, app.state.metrics)
