"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import tokenizer
from frontend.errors import json_response
from frontend.prompts import render_chat
from frontend.sampling import check_token_ids
from frontend.schemas import DetokenizeBody, TokenizeBody, openapi_body, parse
from frontend.service import INLINE_CHARS, read_body, service_of
from shared.errors import InvalidRequest

router = APIRouter()


@router.post("/tokenize", openapi_extra=openapi_body(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """The tokens of a text or a conversation, as generation would see them."""
    service = service_of(request)
    body = parse(await read_body(request), TokenizeBody)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt: give either prompt or messages", param="prompt")
    if body.prompt is not None:
        adds = body.add_special_tokens is not False
        tokens = await service.encode(body.prompt, add_special_tokens=adds, param="prompt")
    else:
        text = await render_chat(
            service,
            body.messages or [],
            tools=body.tools,
            kwargs=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt,
        )
        adds = body.add_special_tokens is True  # the template writes them
        tokens = await service.encode(text, add_special_tokens=adds, param="messages")
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
    names = [service.pieces.bytes_of(i).decode("utf-8", "replace") for i in tokens] if body.return_token_strs else None
    return json_response(msgspec.json.encode(answer | {"token_strs": names}))


@router.post("/detokenize", openapi_extra=openapi_body(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """The text of some tokens, special tokens written out."""
    service = service_of(request)
    body = parse(await read_body(request), DetokenizeBody)
    service.check_model(body.model)
    check_token_ids(body.tokens, service.vocab_size, "tokens")
    decode = partial(tokenizer.decode, service.text.tokenizer, body.tokens, skip_special_tokens=False)
    text = decode() if len(body.tokens) <= INLINE_CHARS else await asyncio.to_thread(decode)
    return json_response(msgspec.json.encode({"prompt": text}))
