"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import logprobs
from frontend.answer import Answer, check_stream_options, respond
from frontend.generation import TokenText, prepare
from frontend.media.parts import MediaPart
from frontend.metrics import HttpMetrics
from frontend.output_events import Call, CallArguments, CallEnd, CallFailed, CallStart, Event, Reasoning, Text, settle
from frontend.output_parser import Request as ParserRequest
from frontend.prompts import encode_chat, render_chat
from frontend.schemas import ChatBody, Tool, openapi_body, parse
from frontend.service import Service, read_body, service_of
from shared.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=openapi_body(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation."""
    service = service_of(request)
    body = parse(await read_body(request), ChatBody)
    service.check_model(body.model)
    _check(body)
    service.engine.require_target()  # before the work of tokenizing
    tools = usable_tools(service, body.tools, is_off=body.tool_choice == "none")
    kwargs = dict(body.chat_template_kwargs or {})
    if body.enable_thinking is not None:
        kwargs["enable_thinking"] = body.enable_thinking
    parts: list[MediaPart] = []
    text = await render_chat(service, body.messages, tools=tools, kwargs=kwargs, media=parts)
    prompt, media = await encode_chat(service, text, parts)
    has_new_name = body.max_completion_tokens is not None
    generation = prepare(
        service,
        request,
        body,
        [prompt],
        media=media,
        max_tokens=body.max_completion_tokens if has_new_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if has_new_name else "max_tokens",
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        parsing=parsing_of(request, text, tools, max_calls=None if body.parallel_tool_calls else 1),
    )
    return await respond(request, body, generation, ChatAnswer(service, body, generation))


def usable_tools(service: Service, tools: Sequence[Tool] | None, *, is_off: bool) -> Sequence[Tool] | None:
    """The tools that the prompt is to tell of; None where there are none, or where they are not to be used.

    Raises:
        InvalidRequest: the model's template cannot tell of tools, or nobody knows how it writes calls.
    """
    if not tools or is_off:
        return None
    if service.template is None or not service.template.knows_tools or not service.output_format.has_tools:
        raise InvalidRequest(
            "tools: this model's chat template has no tool format that is known here "
            "(TANDEM_TOOL_PARSER names one where the template has none of its marks)",
            param="tools",
        )
    return tools


def parsing_of(request: Request, prompt: str, tools: Sequence[Tool] | None, *, max_calls: int | None) -> ParserRequest:
    """How the outputs of this request are to be read."""
    metrics: HttpMetrics = request.app.state.metrics
    return ParserRequest(
        output_format=service_of(request).output_format,
        prompt=prompt,
        tools={t.function.name: t.function.parameters or {} for t in tools} if tools else None,
        max_calls=max_calls,
        on_failed_call=metrics.count_failed_call,
    )


def _check(body: ChatBody) -> None:
    check_stream_options(body)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    if body.tool_choice == "auto" and not body.tools:
        raise InvalidRequest("tool_choice: needs tools", param="tool_choice")
    if body.enable_thinking is not None and "enable_thinking" in (body.chat_template_kwargs or {}):
        raise InvalidRequest("enable_thinking: it is in chat_template_kwargs too", param="enable_thinking")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequest("max_tokens: give max_tokens or max_completion_tokens, not both", param="max_tokens")


class ChatAnswer(Answer):
    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole_choice(self, events: list[Event], tokens: list[TokenText]) -> dict[str, Any]:
        blocks = settle(events)
        text = "".join(block.text for block in blocks if isinstance(block, Text))
        reasoning = "".join(block.text for block in blocks if isinstance(block, Reasoning))
        calls = [_call(block.call_id, block.name, block.arguments) for block in blocks if isinstance(block, Call)]
        message: dict[str, Any] = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return {"message": message, "logprobs": self._logprobs(tokens)}

    def event_choice(self, event: Event, tokens: list[TokenText]) -> dict[str, Any] | None:
        match event:
            case Reasoning(text):
                delta: dict[str, Any] = {"reasoning_content": text}
            case CallStart(index, call_id, name):
                delta = {"tool_calls": [{"index": index, **_call(call_id, name, "")}]}
            case CallArguments(index, json):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": json}}]}
            case Text(text) | CallFailed(_, text):
                delta = {"content": text}
            case CallEnd():
                return None
        return {"delta": delta, "logprobs": self._logprobs(tokens)}

    def finish_reason(self, index: int) -> str | None:
        output = self._generation.outputs[index]
        return "tool_calls" if output.num_calls and output.finish_reason == "stop" else output.finish_reason

    def chunk_choice(self, text: str, tokens: list[TokenText]) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens)}

    def text_template(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b'},"logprobs":null'

    def first_choice(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def _logprobs(self, tokens: list[TokenText]) -> dict[str, Any] | None:
        return {"content": logprobs.chat_entries(tokens, self.pieces), "refusal": None} if tokens else None


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
