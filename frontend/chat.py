"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from frontend import logprobs
from frontend.answer import Answer, check_stream_options, respond
from frontend.caller import Caller, caller_of
from frontend.generation import Generation, TokenText, prepare
from frontend.grammar import Calls, answer_of, grammar_for
from frontend.media.parts import MediaPart
from frontend.output_events import Call, CallArguments, CallEnd, CallFailed, CallStart, Event, Reasoning, Text, settle
from frontend.output_parser import OutputFormat
from frontend.output_parser import Request as ParserRequest
from frontend.prompts import encode_chat, render_chat
from frontend.schemas import AllowedTools, ChatBody, NamedTool, Tool, openapi_body, parse
from frontend.service import Service, read_body, service_of
from frontend.thinking import ThinkingRequest, plan, thinking_for
from shared.errors import InvalidRequest

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=openapi_body(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Continue a conversation."""
    service = service_of(request)
    body = parse(await read_body(request), ChatBody)
    service.check_model(body.model)
    check_stream_options(body)
    generation = await prepare_chat(service, caller_of(request), body)
    return await respond(request, body, generation, ChatAnswer(service, body, generation))


async def prepare_chat(service: Service, caller: Caller, body: ChatBody) -> Generation:
    """The sequences of one conversation, ready to start.

    Raises:
        InvalidRequest: a field is out of place, or does not fit the model.
        Unavailable: no target is ready.
    """
    _check(body)
    target = service.engine.require_target()  # before the work of tokenizing
    tools = usable_tools(service, _allowed(body), is_off=body.tool_choice == "none")
    calls = calls_of(body, tools)
    thinking = plan(service, _thinking_request(body))
    kwargs = {**thinking.template_kwargs, **(body.chat_template_kwargs or {})}
    parts: list[MediaPart] = []
    text = await render_chat(service, body.messages, tools=tools, kwargs=kwargs, media=parts)
    answer = answer_of(body.response_format, body.structured_outputs)
    grammar = await grammar_for(service.grammars, target, thinking.output_format, answer=answer, calls=calls)
    prompt, media = await encode_chat(service, text, parts, salt=caller.text_salt)
    has_new_name = body.max_completion_tokens is not None
    return prepare(
        service,
        caller,
        body,
        [prompt],
        media=media,
        max_tokens=body.max_completion_tokens if has_new_name else body.max_tokens,
        max_tokens_param="max_completion_tokens" if has_new_name else "max_tokens",
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        parsing=parsing_of(
            caller,
            text,
            tools,
            max_calls=None if body.parallel_tool_calls else 1,
            output_format=thinking.output_format,
        ),
        grammar=grammar,
        thinking=thinking_for(service, thinking, text, has_grammar=grammar is not None),
    )


def usable_tools(service: Service, tools: Sequence[Tool] | None, *, is_off: bool) -> Sequence[Tool] | None:
    """The tools that the prompt is to tell of; None where there are none, or where they are not to be used.

    Raises:
        InvalidRequest: the model's template cannot tell of tools, or nobody knows how it writes calls.
    """
    if not tools or is_off:
        return None
    reason = _why_no_tools(service)
    if reason is not None:
        raise InvalidRequest(f"tools: {reason}", param="tools")
    return tools


def _why_no_tools(service: Service) -> str | None:
    """Why this server takes no tools; None where it does."""
    if service.template is None:
        return "this model has no chat template, which would tell it of them"
    if service.settings.tool_parser == "none":
        return "they are switched off here (TANDEM_TOOL_PARSER=none)"
    if not service.template.knows_tools:  # a parser would read calls, but the model would hear of no tool
        return "this model's chat template has no place for them; serve a model that was trained to use tools"
    if not service.output_format.has_tools:
        return (
            "it is not known how this model writes calls: its chat template has the marks of none of the formats "
            "(TANDEM_TOOL_PARSER can name one)"
        )
    return None


def calls_of(body: ChatBody, tools: Sequence[Tool] | None) -> Calls | None:
    """Which calls the output may or must hold.

    Raises:
        InvalidRequest: tool_choice names no tool of the request.
    """
    choice = body.tool_choice
    if not tools:
        return None
    if isinstance(choice, NamedTool):
        return named_call(tools, choice.function.name, "tool_choice.function.name")
    is_limited = isinstance(choice, AllowedTools)
    is_required = choice == "required" or (isinstance(choice, AllowedTools) and choice.allowed_tools.mode == "required")
    is_single = not body.parallel_tool_calls
    return Calls(tools=tools, is_required=is_required, is_single=is_single, is_limited=is_limited)


def _allowed(body: ChatBody) -> Sequence[Tool] | None:
    """The tools that the request lets the model call.

    Raises:
        InvalidRequest: it allows one that is not there.
    """
    if not isinstance(body.tool_choice, AllowedTools):
        return body.tools
    known = {tool.function.name: tool for tool in body.tools or ()}
    names = [entry.function.name for entry in body.tool_choice.allowed_tools.tools]
    for i, name in enumerate(names):
        if name not in known:
            place = f"tool_choice.allowed_tools.tools[{i}].function.name"
            raise InvalidRequest(f"{place}: {name!r} is none of the request's tools", param=place)
    return [tool for name, tool in known.items() if name in names]


def named_call(tools: Sequence[Tool], name: str, param: str) -> Calls:
    """One call of the tool with this name. Raises InvalidRequest where there is none."""
    if all(tool.function.name != name for tool in tools):
        raise InvalidRequest(f"{param}: {name!r} is none of the request's tools", param=param)
    return Calls(tools=tools, is_required=True, is_single=True, only=name)


def _thinking_request(body: ChatBody) -> ThinkingRequest:
    return ThinkingRequest(
        is_enabled=body.enable_thinking,
        effort=body.reasoning_effort,
        budget=body.thinking_budget,
        start=body.thinking_start_token,
        end=body.thinking_end_token,
    )


def parsing_of(
    caller: Caller,
    prompt: str,
    tools: Sequence[Tool] | None,
    *,
    max_calls: int | None,
    output_format: OutputFormat,
) -> ParserRequest:
    """How the outputs of this request are to be read."""
    return ParserRequest(
        output_format=output_format,
        prompt=prompt,
        tools={t.function.name: t.function.parameters or {} for t in tools} if tools else None,
        max_calls=max_calls,
        on_failed_call=caller.on_failed_call,
    )


def _check(body: ChatBody) -> None:
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    if body.tool_choice not in (None, "none") and not body.tools:
        raise InvalidRequest("tool_choice: needs tools", param="tool_choice")
    for name in ("enable_thinking", "reasoning_effort"):
        if getattr(body, name) is not None and name in (body.chat_template_kwargs or {}):
            raise InvalidRequest(f"{name}: it is in chat_template_kwargs too", param=name)
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
