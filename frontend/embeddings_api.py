"""POST /v1/embeddings: one vector of length 1 for each text, out of the served model's hidden rows."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from fastapi import APIRouter
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from frontend.cache_api import cache_salt
from frontend.engine_protocol import Engine
from frontend.errors import json_response
from frontend.generation import ClientWatcher
from frontend.prompts import encode_prompts
from frontend.schemas import Body, openapi_body, parse
from frontend.service import Service, read_body, service_of
from frontend.streams import ClientGone, TokenStream
from shared.errors import ContextLength, EngineFailure, InvalidRequest, from_code
from shared.messages import Output, Pooling, RequestId, SamplingParams, Submit

router = APIRouter()

MAX_INPUTS = 2048  # as in OpenAI's API
NUM_AT_ONCE = 32  # of one request in the engine: a long list neither fills the queue nor holds up other requests


class EmbeddingsBody(Body, frozen=True, kw_only=True):
    input: str | list[Any]
    model: str = "default"
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.post("/v1/embeddings", openapi_extra=openapi_body(EmbeddingsBody))
async def embeddings(request: Request) -> Response:
    """Vectors for texts."""
    service = service_of(request)
    body = parse(await read_body(request), EmbeddingsBody)
    service.check_model(body.model)
    pooling = pooling_for(service)
    target = service.engine.require_target()
    if not target.embedding_size:
        text = f"model: the hidden rows of {target.architecture} cannot be seen, so it gives no embeddings"
        raise InvalidRequest(text, param="model")
    if body.dimensions is not None and body.dimensions > target.embedding_size:
        text = f"dimensions: {body.dimensions}; this model's vectors have {target.embedding_size}"
        raise InvalidRequest(text, param="dimensions")
    prompts = await encode_prompts(service, body.input, param="input", max_num=MAX_INPUTS)
    for prompt in prompts:
        if len(prompt) >= target.max_model_len:
            text = f"input: a text has {len(prompt)} tokens; this model takes {target.max_model_len - 1}"
            raise ContextLength(text, param="input")
    adapter = service.adapter_of(body.model)
    pooled = PooledPrompts(service.engine, [_submit(request, prompt, pooling, adapter) for prompt in prompts])
    watcher = ClientWatcher(request, pooled)
    try:
        vectors = await pooled.vectors()
    finally:
        watcher.close()
    num_tokens = sum(map(len, prompts))
    answer = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _shown(normalized(vector, body.dimensions), body)}
            for i, vector in enumerate(vectors)
        ],
        "model": service.shown_name(body.model),
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    return json_response(msgspec.json.encode(answer))


def pooling_for(service: Service) -> Pooling:
    """How prompts become vectors here: as the setting says, or else the checkpoint.

    Raises:
        InvalidRequest: the model is none for embeddings, or pools in a way that is not supported.
    """
    name, of_checkpoint = service.model_name, service.text.pooling
    match service.settings.pooling:
        case "last" | "mean" as kind:
            return kind
        case "none":
            raise InvalidRequest("model: embeddings are switched off (TANDEM_POOLING=none)", param="model")
    if of_checkpoint is None:
        raise InvalidRequest(
            f"model: {name} generates text and gives no embeddings; load an embedding model for them, or set "
            "TANDEM_POOLING to last or mean",
            param="model",
        )
    if of_checkpoint.kind is None:
        raise InvalidRequest(f"model: {name} gives no embeddings here: {of_checkpoint.reason}", param="model")
    return of_checkpoint.kind


def _submit(request: Request, prompt: list[int], pooling: Pooling, adapter: str) -> Submit:
    return Submit(
        request_id=RequestId(uuid.uuid4().hex),
        prompt_token_ids=prompt,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=1,
        tenant=request.scope.get("tenant", ""),
        timeout_s=request.scope.get("timeout_s"),
        cache_salt=cache_salt(request),
        pooling=pooling,
        adapter=adapter,
    )


class PooledPrompts:
    """The pooled sequences of one request, some at a time; what a ClientWatcher watches."""

    def __init__(self, engine: Engine, submits: Sequence[Submit]) -> None:
        self._engine = engine
        self._submits = submits
        self._stream: TokenStream | None = None
        self._is_abandoned = False

    async def vectors(self) -> list[np.ndarray]:
        """(H,) float32 for each Submit, in order.

        Raises:
            TandemError: the engine refused one or failed, or the client left.
        """
        found: list[np.ndarray] = []
        try:
            for first in range(0, len(self._submits), NUM_AT_ONCE):
                found += await self._lot(self._submits[first : first + NUM_AT_ONCE])
        finally:
            self.close()
        return found

    async def _lot(self, submits: Sequence[Submit]) -> list[np.ndarray]:
        if self._is_abandoned:
            raise ClientGone("the client closed the connection")
        self._stream = self._engine.open(submits)
        found: dict[int, np.ndarray] = {}
        while len(found) < len(submits):
            for index, output in await self._stream.get():
                if output.finish_reason is not None:
                    found[index] = _vector(output)
        return [found[i] for i in range(len(submits))]

    def abandon(self) -> None:
        """The client is gone: stop the engine's work."""
        self._is_abandoned = True
        self.close()
        if self._stream is not None:
            self._stream.fail(ClientGone("the client closed the connection"))

    def disconnect_slow_reader(self, abort: Callable[[], None] | None) -> None:
        """Nothing is sent before all is done, so there is nothing to read slowly."""

    def close(self) -> None:
        """Cancel what has not ended."""
        for submit in self._submits:
            self._engine.forget(submit.request_id)


def _vector(output: Output) -> np.ndarray:
    if output.embedding is None:
        text = output.error or "the engine ended this request before it was complete"
        raise from_code(output.error_code or EngineFailure.code, text)
    return np.frombuffer(output.embedding, "<f4")


def normalized(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers (Matryoshka embeddings keep most of the meaning there), scaled to length 1."""
    cut = vector[:dimensions].astype(np.float64)
    length = float(np.linalg.norm(cut))
    scaled: np.ndarray = (cut / length if length > 0 else cut).astype("<f4")
    return scaled


def _shown(vector: np.ndarray, body: EmbeddingsBody) -> str | list[float]:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
