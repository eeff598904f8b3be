"""Prompts of every form, as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from frontend.history import arguments_of, write_history
from frontend.media.parts import MEDIA_TYPES, MediaPart, chat_part
from frontend.sampling import check_token_ids
from frontend.schemas import ChatMessage, Tool
from frontend.service import INLINE_CHARS, Service
from shared.errors import InvalidRequest
from shared.messages import MediaItem

MAX_PROMPTS = 128


async def render_chat(
    service: Service,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Tool] | None,
    kwargs: dict[str, Any] | None,
    add_generation_prompt: bool = True,
    media: list[MediaPart] | None = None,
    param: str = "messages",
) -> str:
    """A conversation as the template writes it, special tokens included.

    Args:
        media: gets the messages' images in order; None where they are not supported.
        param: the request's field that holds the conversation.
    Raises:
        InvalidRequest: a content part is not text or media, or the template refuses the messages.
    """
    template = service.template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param=param)
    found = _MediaParts(service, media)
    plain = [_plain(m, i, knows_developer=template.knows_developer, media=found) for i, m in enumerate(messages)]
    _rename_calls(plain, service)
    num_chars = sum(len(str(m["content"])) for m in plain)
    plain_tools = [plain_tool(tool) for tool in tools] if tools else None

    def render() -> str:
        def write(them: list[dict[str, Any]]) -> str:
            return template.render(them, tools=plain_tools, kwargs=kwargs, add_generation_prompt=add_generation_prompt)

        return write_history(write, plain, param)

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


def _plain(message: ChatMessage, index: int, *, knows_developer: bool, media: _MediaParts) -> dict[str, Any]:
    """The dict that templates expect: text content, a system role they know, tool arguments as objects."""
    place = f"messages[{index}]"
    # Templates have no place for a refusal: it is what the assistant said, and comes back without content.
    said = message.refusal if message.role == "assistant" and not message.content else None
    if message.content is None and said is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequest(f"{place}.content: required field is missing", param=f"{place}.content")
    role = "system" if message.role == "developer" and not knows_developer else message.role
    plain: dict[str, Any] = {"role": role, "content": said or _content(message.content, f"{place}.content", media)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": arguments_of(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return plain


class _MediaParts:
    """Collects the media of a request's messages."""

    def __init__(self, service: Service, found: list[MediaPart] | None) -> None:
        self._loader = service.media
        self._found = found

    def add(self, part: dict[str, Any], place: str) -> dict[str, str]:
        """The part that a template expects in its place."""
        read = part.get("part")  # set by the Messages API's own reader, never by JSON
        place = read.param if isinstance(read, MediaPart) else f"{place}.type"
        if self._loader is None or self._found is None:
            why = "this model takes text only" if self._loader is None else "media are not supported here"
            raise InvalidRequest(f"{place}: parts of type {part['type']!r} are not supported: {why}", param=place)
        self._found.append(read if isinstance(read, MediaPart) else chat_part(part, place.removesuffix(".type")))
        return self._loader.template_part(self._found[-1])


def _content(content: str | list[dict[str, Any]] | None, place: str, media: _MediaParts) -> str | list[dict[str, str]]:
    """A text, or a list of parts where media are among them: not all templates know lists."""
    if not isinstance(content, list):
        return content or ""
    parts = [
        media.add(part, f"{place}[{i}]") if _is_medium(part.get("type")) else _text_part(part, f"{place}[{i}]")
        for i, part in enumerate(content)
    ]
    if any(_is_medium(part.get("type")) for part in content):
        return parts
    return "\n".join(part["text"] for part in parts)


def _is_medium(kind: object) -> bool:
    return isinstance(kind, str) and kind in MEDIA_TYPES  # JSON may have put a list there, which no dict knows


def _text_part(part: dict[str, Any], place: str) -> dict[str, str]:
    kind = part.get("type")
    if kind != "text":
        raise InvalidRequest(f"{place}.type: parts of type {kind!r} are not supported", param=f"{place}.type")
    for key in part:
        if key not in ("type", "text"):
            raise InvalidRequest(f"{place}.{key}: unknown or unsupported field", param=f"{place}.{key}")
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{place}.text: expected `str`", param=f"{place}.text")
    return {"type": "text", "text": part["text"]}


async def encode_chat(
    service: Service, text: str, media: Sequence[MediaPart], *, salt: str, param: str = "messages"
) -> tuple[list[int], list[MediaItem]]:
    """A rendered conversation as tokens, with its media in their places.

    Args:
        salt: as the prefix cache has it: tokens of its parts are remembered under it.
    Raises:
        InvalidRequest: a medium cannot be used.
    """
    if not media:
        return await service.encode(text, add_special_tokens=False, param=param, salt=salt), []
    assert service.media is not None, "media were collected for a model that takes text only"
    loaded = await service.media.load(media)
    text = service.media.rewrite(text, loaded)
    tokens = await service.encode(text, add_special_tokens=False, param=param, salt=salt)
    return service.media.place(tokens, loaded)


async def encode_prompts(
    service: Service, prompt: str | list[Any], *, param: str = "prompt", max_num: int = MAX_PROMPTS
) -> list[list[int]]:
    """The prompts of /v1/completions, or what is to be embedded: a text, texts, token ids, or lists of token ids.

    Raises:
        InvalidRequest: mixed, empty or too many prompts, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        prompts: list[Any] = [prompt]
    elif prompt and all(type(item) is int for item in prompt):
        prompts = [prompt]
    else:
        prompts = prompt
    if not 1 <= len(prompts) <= max_num:
        raise InvalidRequest(f"{param}: {len(prompts)} prompts; 1 to {max_num} are allowed", param=param)
    encoded = []
    for item in prompts:
        if isinstance(item, str):
            ids = await service.encode(item, add_special_tokens=True, param=param)
        elif isinstance(item, list) and all(type(i) is int for i in item):
            check_token_ids(item, service.vocab_size, param)
            ids = item
        else:
            raise InvalidRequest(
                f"{param}: expected a text, a list of texts, token ids, or a list of lists of token ids", param=param
            )
        if not ids:
            raise InvalidRequest(f"{param}: it has no tokens", param=param)
        encoded.append(ids)
    return encoded
