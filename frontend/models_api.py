"""GET /v1/models."""

from __future__ import annotations

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
    """The one model that is served."""
    return json_response(msgspec.json.encode({"object": "list", "data": [_card(service_of(request))]}))


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: str) -> Response:
    """The served model, by its name or as "default"."""
    service = service_of(request)
    service.check_model(model_id)
    return json_response(msgspec.json.encode(_card(service)))


def _card(service: Service) -> dict[str, Any]:
    """`max_model_len` and `context_window` are null until a target has been ready once."""
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "tandem",
        "root": service.settings.model,
        "parent": None,
        "max_model_len": service.max_model_len,
        "context_window": service.max_model_len,
        "input_modalities": service.modalities,
    }
