"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import errors
from frontend.answer import respond
from frontend.caller import caller_of
from frontend.chat import named_call, parsing_of, usable_tools
from frontend.generation import prepare
from frontend.grammar import Answer, Calls, grammar_for, json_answer
from frontend.media.parts import MediaPart
from frontend.messages_answer import MessagesAnswer
from frontend.messages_prompt import chat_messages, chat_tools, thinks
from frontend.messages_schemas import CountTokensBody, MessagesBody, Prompt
from frontend.prompts import encode_chat, render_chat
from frontend.schemas import GenerationBody, Tool, openapi_body, parse
from frontend.service import Service, read_body, service_of
from frontend.thinking import ThinkingPlan, ThinkingRequest, markers, plan, thinking_for
from shared.errors import ContextLength, InvalidRequest

router = APIRouter()

_SCHEMA_PARAM = "tools[{}].input_schema"


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
    thinking = _thinking(service, body)
    parts: list[MediaPart] = []
    text = await _render(service, body, tools, thinking, parts)
    prompt, media = await encode_chat(service, text, parts, salt=caller_of(request).text_salt)
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
    grammar = await grammar_for(
        service.grammars, target, thinking.output_format, answer=_answer(body), calls=_calls(body, tools)
    )
    caller = caller_of(request)
    ends_after_call = body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use
    generation = prepare(
        service,
        caller,
        generation_body,
        [prompt],
        media=media,
        max_tokens=min(body.max_tokens, room),
        max_tokens_param="max_tokens",
        num_logprobs=None,
        parsing=parsing_of(
            caller,
            text,
            tools,
            max_calls=1 if ends_after_call else None,
            output_format=thinking.output_format,
        ),
        grammar=grammar,
        thinking=thinking_for(service, thinking, text, has_grammar=grammar is not None),
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
    text = await _render(service, body, _tools(service, body), _thinking(service, body), parts)
    prompt, _ = await encode_chat(service, text, parts, salt=caller_of(request).text_salt)
    return errors.json_response(msgspec.json.encode({"input_tokens": len(prompt)}))


def _tools(service: Service, body: Prompt) -> Sequence[Tool] | None:
    is_off = body.tool_choice is not None and body.tool_choice.type == "none"
    return usable_tools(service, chat_tools(body.tools), is_off=is_off)


async def _render(
    service: Service, body: Prompt, tools: Sequence[Tool] | None, thinking: ThinkingPlan, media: list[MediaPart]
) -> str:
    return await render_chat(service, chat_messages(body), tools=tools, kwargs=thinking.template_kwargs, media=media)


def _thinking(service: Service, body: Prompt) -> ThinkingPlan:
    """As in Anthropic's API thinking has to be asked for. Clients send budget and effort to any model, so they only act
    on one that reasons."""
    is_enabled = thinks(body)
    can_reason = markers(service.output_format) is not None
    knows_effort = service.template is not None and service.template.knows_effort
    effort = body.output_config.effort if body.output_config is not None else None
    budget = body.thinking.budget_tokens if body.thinking is not None else None
    return plan(
        service,
        ThinkingRequest(
            is_enabled=is_enabled,
            effort=effort if knows_effort or (can_reason and is_enabled) else None,
            budget=budget if can_reason and is_enabled else None,
        ),
    )


def _answer(body: Prompt) -> Answer | None:
    nested = body.output_config.format if body.output_config is not None else None
    if nested is not None and body.output_format is not None:
        raise InvalidRequest("output_format: output_config.format is given too", param="output_format")
    if nested is not None:
        return json_answer(nested.schema, "output_config.format.schema")
    return json_answer(body.output_format.schema, "output_format.schema") if body.output_format is not None else None


def _calls(body: Prompt, tools: Sequence[Tool] | None) -> Calls | None:
    choice = body.tool_choice
    if choice is not None and choice.type in ("any", "tool") and not tools:
        raise InvalidRequest("tool_choice: needs tools", param="tool_choice")
    if not tools:
        return None
    if choice is not None and choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name: required field is missing", param="tool_choice.name")
        return msgspec.structs.replace(named_call(tools, choice.name, "tool_choice.name"), param=_SCHEMA_PARAM)
    is_single = choice is not None and choice.disable_parallel_tool_use
    is_required = choice is not None and choice.type == "any"
    return Calls(tools=tools, is_required=is_required, is_single=is_single, param=_SCHEMA_PARAM)
