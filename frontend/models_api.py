"""GET /v1/models, with the fields of OpenAI's cards and of Anthropic's, which do not contradict each other."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend.errors import json_response
from frontend.service import Service, service_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The model that is served, then its LoRA adapters."""
    service = service_of(request)
    cards = [_card(service), *(_card(service, adapter) for adapter in service.adapters)]
    page = {"object": "list", "data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
    return json_response(msgspec.json.encode(page))


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """The served model, by its name or as "default", or one of its adapters."""
    service = service_of(request)
    service.check_model(model_id)
    return json_response(msgspec.json.encode(_card(service, service.adapter_of(model_id))))


def _card(service: Service, adapter: str = "") -> dict[str, Any]:
    """The context's size under the names by which clients look for it; null until a target has been ready once.

    `max_model_len` is vLLM's name, `context_window` Groq's, `context_length` OpenRouter's, `max_input_tokens` and
    `max_tokens` Anthropic's (prompt and output share the context, so both have all of it but one token).
    """
    limit = service.max_model_len
    created_at = datetime.fromtimestamp(service.started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "id": adapter or service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "tandem",
        "root": service.adapters[adapter] if adapter else service.settings.model,
        "parent": service.model_name if adapter else None,
        "max_model_len": limit,
        "context_window": limit,
        "context_length": limit,
        "type": "model",
        "display_name": adapter or service.model_name,
        "created_at": created_at,
        "max_input_tokens": limit - 1 if limit is not None else None,
        "max_tokens": limit - 1 if limit is not None else None,
        "input_modalities": service.modalities,
    }
