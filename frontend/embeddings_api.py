"""POST /v1/embeddings: refused clearly, until the engine can pool hidden rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from frontend.schemas import Body, openapi_body, parse
from frontend.service import read_body, service_of
from shared.errors import InvalidRequest

router = APIRouter()


class EmbeddingsBody(Body, frozen=True, kw_only=True):
    input: str | list[Any]
    model: str = "default"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.post("/v1/embeddings", openapi_extra=openapi_body(EmbeddingsBody))
async def embeddings(request: Request) -> Response:
    """Vectors for texts: no model that this server can load gives any."""
    service = service_of(request)
    body = parse(await read_body(request), EmbeddingsBody)
    service.check_model(body.model)
    if service.text.is_embedding_model:
        raise InvalidRequest(
            f"model: {service.model_name} is an embedding model; pooling is not supported yet", param="model"
        )
    raise InvalidRequest(
        f"model: {service.model_name} generates text and gives no embeddings; load an embedding model for them",
        param="model",
    )
