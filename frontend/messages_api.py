"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import errors
from frontend.answer import respond
from frontend.chat import parsing_of, usable_tools
from frontend.generation import prepare
from frontend.media.parts import MediaPart
from frontend.messages_answer import MessagesAnswer
from frontend.messages_prompt import chat_messages, chat_tools, thinks
from frontend.messages_schemas import CountTokensBody, MessagesBody, Prompt
from frontend.prompts import encode_chat, render_chat
from frontend.schemas import GenerationBody, Tool, openapi_body, parse
from frontend.service import Service, read_body, service_of
from shared.errors import ContextLength, InvalidRequest

router = APIRouter()


@router.post("/v1/messages", openapi_extra=openapi_body(MessagesBody))
async def messages(request: Request) -> Response:
    """Continue a conversation, in Anthropic's shapes."""
    service = service_of(request)
    body = parse(await read_body(request), MessagesBody)
    service.check_model(body.model)
    if body.thinking is not None and (body.thinking.budget_tokens or 0) >= body.max_tokens:
        place = "thinking.budget_tokens"
        raise InvalidRequest(f"{place}: must be less than max_tokens", param=place)
    target = service.engine.require_target()
    tools = _tools(service, body)
    parts: list[MediaPart] = []
    text = await _render(service, body, tools, parts)
    prompt, media = await encode_chat(service, text, parts)
    room = target.max_model_len - len(prompt)
    if room < 1:  # the words by which clients know that they should make the conversation shorter
        raise ContextLength(f"prompt is too long: {len(prompt)} tokens > {target.max_model_len - 1} maximum")
    generation_body = GenerationBody(
        model=body.model,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
    )
    ends_after_call = body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use
    generation = prepare(
        service,
        request,
        generation_body,
        [prompt],
        media=media,
        max_tokens=min(body.max_tokens, room),
        max_tokens_param="max_tokens",
        num_logprobs=None,
        parsing=parsing_of(request, text, tools, max_calls=1 if ends_after_call else None),
    )
    answer = MessagesAnswer(
        service,
        generation,
        errors.request_id_of(request.scope),
        shows_thinking=body.thinking is None or body.thinking.display != "omitted",
        is_clamped=body.max_tokens > room,
    )
    return await respond(request, generation_body, generation, answer)


@router.post("/v1/messages/count_tokens", openapi_extra=openapi_body(CountTokensBody))
async def count_tokens(request: Request) -> Response:
    """How many tokens the prompt of such a request has."""
    service = service_of(request)
    body = parse(await read_body(request), CountTokensBody)
    service.check_model(body.model)
    parts: list[MediaPart] = []
    text = await _render(service, body, _tools(service, body), parts)
    prompt, _ = await encode_chat(service, text, parts)
    return errors.json_response(msgspec.json.encode({"input_tokens": len(prompt)}))


def _tools(service: Service, body: Prompt) -> Sequence[Tool] | None:
    is_off = body.tool_choice is not None and body.tool_choice.type == "none"
    return usable_tools(service, chat_tools(body.tools), is_off=is_off)


async def _render(service: Service, body: Prompt, tools: Sequence[Tool] | None, media: list[MediaPart]) -> str:
    kwargs: dict[str, Any] = {"enable_thinking": thinks(body)}
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        kwargs["reasoning_effort"] = effort if effort in ("low", "medium") else "high"  # templates know these three
    return await render_chat(service, chat_messages(body), tools=tools, kwargs=kwargs, media=media)
