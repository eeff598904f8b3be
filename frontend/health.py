"""GET /health: 200 only while a request would reach a ready target."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend.errors import json_response
from frontend.service import service_of
from shared.messages import EngineStatus, Exactness

router = APIRouter()


def _exactness(status: EngineStatus | None) -> Exactness | None:
    """How far verifying drafts is from decoding on the target's machine, where drafts are used."""
    return status.target_info.exactness if status is not None and status.target_info is not None else None


def _attention(status: EngineStatus | None) -> list[str]:
    """Which attention kernels the target uses and why, a line for each shape; empty: stock operations."""
    return status.target_info.attention if status is not None and status.target_info is not None else []


@router.get("/health")
async def health(request: Request) -> Response:
    """The states of the engine's processes. 503 with Retry-After whenever a new request would not be served."""
    service = service_of(request)
    engine = service.engine
    status = engine.status
    is_known = status is not None and not engine.is_silent
    info = status.target_info if status is not None else None
    is_ready = engine.is_ready and not service.door.reason
    answer = {
        "status": service.door.reason or ("ok" if is_ready else "unavailable"),
        "model": service.model_name,
        "input_modalities": service.modalities,
        "scheduler": "ready" if is_known else "silent",
        "target": status.target if status is not None and is_known else "unknown",
        "drafter": status.drafter if status is not None and is_known else "unknown",
        "num_running": status.num_running if status is not None and is_known else None,
        "num_waiting": status.num_waiting if status is not None and is_known else None,
        "num_open_requests": engine.num_live,
        "num_slots": info.num_slots if info is not None else None,
        "device": info.device if info is not None else None,
        "model_change": service.model_change.described(),
        "exactness": _exactness(status),
        "attention": _attention(status),
    }
    content = msgspec.json.encode(answer)
    return json_response(content) if is_ready else json_response(content, 503, {"retry-after": "2"})
