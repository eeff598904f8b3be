"""Prompts of every form, as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from frontend.sampling import check_token_ids
from frontend.schemas import ChatMessage, Tool
from frontend.service import INLINE_CHARS, Service
from shared.errors import InvalidRequest

MAX_PROMPTS = 128


async def render_chat(
    service: Service,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] | None,
    kwargs: dict[str, Any] | None,
    add_generation_prompt: bool = True,
) -> str:
    """A conversation as the template writes it, special tokens included.

    Raises:
        InvalidRequest: a content part is not text, or the template refuses the messages.
    """
    template = service.template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    plain = [_plain(m, i, knows_developer=template.knows_developer) for i, m in enumerate(messages)]
    _rename_calls(plain, service)
    num_chars = sum(len(str(m["content"])) for m in plain)
    plain_tools = [plain_tool(tool) for tool in tools] if tools else None

    def render() -> str:
        return template.render(plain, tools=plain_tools, kwargs=kwargs, add_generation_prompt=add_generation_prompt)

    return render() if num_chars <= INLINE_CHARS else await asyncio.to_thread(render)


def plain_tool(tool: Tool) -> dict[str, Any]:
    """As templates expect it: most read the description and the parameters without asking whether they are there."""
    function = tool.function
    parameters = function.parameters or {"type": "object", "properties": {}}
    plain = {"name": function.name, "description": function.description or "", "parameters": parameters}
    return {"type": "function", "function": plain}


def _rename_calls(plain: list[dict[str, Any]], service: Service) -> None:
    """Some templates insist on ids of a certain form, which a client's history need not have."""
    form = service.output_format.tools
    if form is None or form.history_id is None:
        return
    renamed: dict[str, str] = {}
    for message in plain:
        for call in message.get("tool_calls", ()):
            call_id = call["id"]
            renamed[call_id] = call["id"] = form.history_id(call_id, call["function"]["name"], len(renamed))
        if message.get("tool_call_id") in renamed:
            message["tool_call_id"] = renamed[message["tool_call_id"]]


def _plain(message: ChatMessage, index: int, *, knows_developer: bool) -> dict[str, Any]:
    """The dict that templates expect: text content, a system role they know, tool arguments as objects."""
    place = f"messages[{index}]"
    if message.content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{place}.content: required field is missing", param=f"{place}.content")
    role = "system" if message.role == "developer" and not knows_developer else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message.content, f"{place}.content")}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


def _text(content: str | list[dict[str, Any]] | None, place: str) -> str:
    if not isinstance(content, list):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        if part.get("type") != "text":
            kind = part.get("type")
            raise InvalidRequest(
                f"{place}[{i}].type: parts of type {kind!r} are not supported", param=f"{place}[{i}].type"
            )
        for key in part:
            if key not in ("type", "text"):
                raise InvalidRequest(f"{place}[{i}].{key}: unknown or unsupported field", param=f"{place}[{i}].{key}")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{place}[{i}].text: expected `str`", param=f"{place}[{i}].text")
        texts.append(part["text"])
    return "\n".join(texts)


def _arguments(arguments: str) -> Any:  # noqa: ANN401 - any JSON value
    """Templates print arguments as JSON, so a string would be quoted twice; one that is no JSON stays a string."""
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments


async def encode_prompts(service: Service, prompt: str | list[Any]) -> list[list[int]]:
    """The prompts of /v1/completions: a text, texts, token ids, or lists of token ids.

    Raises:
        InvalidRequest: mixed, empty or too many prompts, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif prompt and all(type(item) is int for item in prompt):
        prompts = [prompt]
    else:
        prompts = prompt
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequest(f"prompt: {len(prompts)} prompts; 1 to {MAX_PROMPTS} are allowed", param="prompt")
    encoded = []
    for item in prompts:
        if isinstance(item, str):
            ids = await service.encode(item, add_special_tokens=True, param="prompt")
        elif isinstance(item, list) and all(type(i) is int for i in item):
            check_token_ids(item, service.vocab_size, "prompt")
            ids = item
        else:
            raise InvalidRequest(
                "prompt: expected a text, a list of texts, token ids, or a list of lists of token ids", param="prompt"
            )
        if not ids:
            raise InvalidRequest("prompt: it has no tokens", param="prompt")
        encoded.append(ids)
    return encoded
