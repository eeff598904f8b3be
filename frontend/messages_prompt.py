"""A Messages request as the chat messages that templates know."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from frontend.media.parts import RESULT_IMAGE, anthropic_source, result_image
from frontend.messages_schemas import (
    DocumentBlock,
    ImageBlock,
    MessagesTool,
    Prompt,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from frontend.schemas import ChatMessage, Function, FunctionCall, Tool, ToolCall
from shared.errors import InvalidRequest

# Claude Code's first system block says what is billed, with a number that changes from request to request. It says
# nothing to a model, and in front of everything else it would keep any prefix from being found in the cache.
_BILLING = "x-anthropic-billing-header:"


def chat_messages(body: Prompt) -> list[ChatMessage]:
    """System, turns and tool results, in order.

    Raises:
        InvalidRequest: an image, a block where it may not stand, a result without its call, or a prefilled answer.
    """
    messages: list[ChatMessage] = []
    system = [body.system] if isinstance(body.system, str) else [block.text for block in body.system or []]
    told = [text for text in system if text and not text.startswith(_BILLING)]
    if told:
        messages.append(ChatMessage(role="system", content="\n\n".join(told)))
    names: dict[str, str] = {}
    for i, turn in enumerate(body.messages):
        if turn.role == "assistant":
            messages.append(_assistant(turn, f"messages[{i}]", names))
        else:
            messages += _user(turn, f"messages[{i}]", names)
    if body.messages[-1].role == "assistant":
        place = f"messages[{len(body.messages) - 1}]"
        raise InvalidRequest(f"{place}: going on with a prefilled answer is not supported", param=place)
    return messages


def chat_tools(tools: list[MessagesTool] | None) -> list[Tool] | None:
    return [
        Tool(
            type="function",
            function=Function(name=t.name, description=t.description, parameters=t.input_schema, strict=t.strict),
        )
        for t in tools or ()
    ] or None


def _user(turn: Turn, place: str, names: dict[str, str]) -> list[ChatMessage]:
    if isinstance(turn.content, str):
        return [ChatMessage(role="user", content=turn.content)]
    messages: list[ChatMessage] = []
    parts: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []  # of the tool results just read

    def end_text() -> None:
        if parts:
            messages.append(ChatMessage(role="user", content=_joined(parts)))
            parts.clear()

    for i, block in enumerate(turn.content):
        where = f"{place}.content[{i}]"
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in names:
                raise InvalidRequest(
                    f"{where}.tool_use_id: no tool_use block before it has the id {block.tool_use_id!r}",
                    param=f"{where}.tool_use_id",
                )
            end_text()
            name = names[block.tool_use_id]
            content = _result(block, where, images, name)
            messages.append(ChatMessage(role="tool", content=content, tool_call_id=block.tool_use_id, name=name))
            continue
        parts += images
        images.clear()
        if isinstance(block, ImageBlock):
            parts.append({"type": "image_url", "part": anthropic_source(block.source, f"{where}.source")})
        else:
            parts.append({"type": "text", "text": _text(block, where)})
    parts += images
    end_text()
    return messages or [ChatMessage(role="user", content="")]


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return list(parts)


def _result(block: ToolResultBlock, place: str, images: list[dict[str, Any]], name: str) -> str:
    """Templates have no place for a flag, so that a call failed is said in words. Its images go to `images`."""
    texts = [block.content or ""] if not isinstance(block.content, list) else []
    for i, part in enumerate(block.content if isinstance(block.content, list) else []):
        where = f"{place}.content[{i}]"
        if isinstance(part, ImageBlock):
            images += result_image(anthropic_source(part.source, f"{where}.source"), name)
            texts.append(RESULT_IMAGE)
        else:
            texts.append(_text(part, where))
    content = "\n".join(texts)
    return f"Error: {content}" if block.is_error else content


def _text(block: object, place: str) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, DocumentBlock):
        return _document(block, place)
    if isinstance(block, ImageBlock):
        raise InvalidRequest(f"{place}: images are supported in user turns only", param=place)
    raise InvalidRequest(f"{place}.type: this block may not stand here", param=f"{place}.type")


def _document(block: DocumentBlock, place: str) -> str:
    source = block.source
    content: Any = source.data if source.type == "text" else source.content
    if content is None:
        missing = f"{place}.source.{'data' if source.type == 'text' else 'content'}"
        raise InvalidRequest(f"{missing}: required field is missing", param=missing)
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    head = [f"{name}: {value}" for name, value in (("Title", block.title), ("Context", block.context)) if value]
    return "\n".join(["<document>", *head, text, "</document>"])


def _assistant(turn: Turn, place: str, names: dict[str, str]) -> ChatMessage:
    if isinstance(turn.content, str):
        return ChatMessage(role="assistant", content=turn.content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(turn.content):
        if isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            names[block.id] = block.name
            arguments = msgspec.json.encode(block.input).decode()
            calls.append(ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=arguments)))
        else:
            texts.append(_text(block, f"{place}.content[{i}]"))
    return ChatMessage(
        role="assistant",
        content="".join(texts),
        tool_calls=calls or None,
        reasoning_content="\n".join(t for t in thoughts if t) or None,
    )


def thinks(body: Prompt) -> bool:
    """As in Anthropic's API, thinking has to be asked for."""
    kind: Literal["enabled", "disabled", "adaptive"] = body.thinking.type if body.thinking else "disabled"
    return kind != "disabled"
