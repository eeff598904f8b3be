"""Items as the chat messages that templates know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from frontend.media.parts import RESULT_IMAGE, MediaPart, from_url, result_image
from frontend.responses import items, tools
from frontend.responses.items import AnyItem
from frontend.responses.seal import unseal
from frontend.schemas import ChatMessage, FunctionCall, ToolCall
from shared.errors import BadSeal, InvalidRequest


class Placed(Struct, frozen=True):
    """An item and where the request has it, for error messages."""

    item: AnyItem
    place: str


class Unsealer(Struct, frozen=True):
    """Reads what clients keep for the server."""

    key: bytes
    tenant: str

    def reasoning(self, item: items.Reasoning, place: str) -> str:
        if item.encrypted_content is not None:
            text = unseal(self.key, self.tenant, "reasoning", item.encrypted_content)
            return self._checked(text, place)
        parts = item.content if item.content else item.summary
        return "".join(part.text for part in parts)

    def summary(self, item: items.Compaction | items.CompactionSummary, place: str) -> str:
        return self._checked(unseal(self.key, self.tenant, "compaction", item.encrypted_content), place)

    def _checked(self, text: str | None, place: str) -> str:
        if text is None:
            where = f"{place}.encrypted_content"
            raise BadSeal(f"{where}: it was not made by this server for this API key, or was changed", param=where)
        return text


def chat_messages(instructions: str | None, placed: Sequence[Placed], unsealer: Unsealer) -> list[ChatMessage]:
    """Instructions and items, in order. What the assistant said, thought and called in one turn is one message.

    Raises:
        InvalidRequest: a file, an image where none may stand, a result without its call, or content that is not this
            server's.
    """
    writer = _Writer(unsealer)
    if instructions:
        writer.messages.append(ChatMessage(role="system", content=instructions))
    for entry in placed:
        writer.add(entry.item, entry.place)
    writer.end_turn()
    writer.end_results()
    return writer.messages


class _Writer:
    def __init__(self, unsealer: Unsealer) -> None:
        self.messages: list[ChatMessage] = []
        self._unsealer = unsealer
        self._names: dict[str, str] = {}  # of calls, by call id and by item id
        self._call_ids: dict[str, str] = {}
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []
        self._images: list[dict[str, Any]] = []  # of the tool results just read

    def end_turn(self) -> None:
        """Write what the assistant did."""
        if self._thoughts or self._texts or self._calls:
            message = ChatMessage(
                role="assistant",
                content="\n".join(self._texts),
                tool_calls=self._calls or None,
                reasoning_content="\n".join(text for text in self._thoughts if text) or None,
            )
            self.messages.append(message)
        self._thoughts, self._texts, self._calls = [], [], []

    def end_results(self) -> None:
        """Write the images of the tool results before this."""
        if self._images:
            self.messages.append(ChatMessage(role="user", content=self._images))
            self._images = []

    def add(self, item: AnyItem, place: str) -> None:
        if isinstance(item, items.Message) and item.role == "user":
            self.end_turn()
            content, self._images = [*self._images, *_user_parts(item, place)], []
            self.messages.append(ChatMessage(role="user", content=_as_text(content)))
            return
        if not isinstance(item, items.CallOutput):
            self.end_results()
        match item:
            case items.Message():
                text = item.content if isinstance(item.content, str) else _joined(item.content, f"{place}.content")
                if item.role == "assistant":
                    if self._calls:  # in one message templates write text before calls
                        self.end_turn()
                    self._texts.append(text)
                else:
                    self.end_turn()
                    self.messages.append(ChatMessage(role=item.role, content=text))
            case items.Reasoning():
                if self._texts or self._calls:
                    self.end_turn()
                self._thoughts.append(self._unsealer.reasoning(item, place))
            case items.Compaction() | items.CompactionSummary():
                self.end_turn()
                summary = self._unsealer.summary(item, place)
                self.messages.append(ChatMessage(role="user", content=f"{SUMMARY_HEAD}\n{summary}"))
            case items.ItemReference():
                raise AssertionError("references are replaced by their items before")
            case (
                items.FunctionCall()
                | items.CustomToolCall()
                | items.LocalShellCall()
                | items.ShellCall()
                | items.ApplyPatchCall()
            ):
                self._add_call(item)
            case _:
                self._add_result(item, place)

    def _add_call(self, item: items.Call) -> None:
        name, arguments = tools.call_of(item)
        for known in (item.call_id, item.id):
            if known is not None:
                self._names[known] = name
                self._call_ids[known] = item.call_id
        self._calls.append(ToolCall(id=item.call_id, function=FunctionCall(name=name, arguments=arguments)))

    def _add_result(self, item: items.CallOutput, place: str) -> None:
        given = item.call_id
        if isinstance(item, items.LocalShellCallOutput) and given is None:
            given = item.id
        if given is None or given not in self._names:
            where = f"{place}.call_id"
            raise InvalidRequest(f"{where}: no call before it has the id {given!r}", param=where)
        self.end_turn()
        name = self._names[given]
        content = _result(item, place, self._images, name)
        self.messages.append(ChatMessage(role="tool", content=content, tool_call_id=self._call_ids[given], name=name))


SUMMARY_HEAD = "Summary of the conversation before this point:"


def _user_parts(item: items.Message, place: str) -> list[dict[str, Any]]:
    """A user's message as content parts that `render_chat` takes."""
    if isinstance(item.content, str):
        return [{"type": "text", "text": item.content}]
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(item.content):
        where = f"{place}.content[{i}]"
        if isinstance(part, items.InputImage):
            parts.append({"type": "image_url", "part": _image(part, where)})
        else:
            parts.append({"type": "text", "text": _text(part, where)})
    return parts


def _as_text(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    is_text = all(part["type"] == "text" for part in parts)
    return "\n".join(part["text"] for part in parts) if is_text else parts


def _image(part: items.InputImage, place: str) -> MediaPart:
    if part.file_id is not None:
        where = f"{place}.file_id"
        raise InvalidRequest(f"{where}: no files are stored here; use image_url", param=where)
    where = f"{place}.image_url"
    if not part.image_url:
        raise InvalidRequest(f"{where}: required field is missing", param=where)
    return from_url("image", part.image_url, where)


def _result(item: items.CallOutput, place: str, images: list[dict[str, Any]], name: str) -> str:
    """What a call gave, as text; its images go to `images`."""
    match item:
        case items.ShellCallOutput():
            return tools.shell_result(item.output)
        case items.ApplyPatchCallOutput():
            return f"Error: {item.output or ''}" if item.status == "failed" else item.output or "Done."
        case _:
            if isinstance(item.output, str):
                return item.output
            texts = []
            for i, part in enumerate(item.output):
                where = f"{place}.output[{i}]"
                if isinstance(part, items.InputImage):
                    images += result_image(_image(part, where), name)
                    texts.append(RESULT_IMAGE)
                else:
                    texts.append(_text(part, where))
            return "\n".join(texts)


def _joined(parts: Sequence[items.AnyPart], place: str) -> str:
    return "\n".join(_text(part, f"{place}[{i}]") for i, part in enumerate(parts))


def _text(part: items.AnyPart, place: str) -> str:
    match part:
        case items.InputText(text=text) | items.OutputText(text=text) | items.Refusal(refusal=text):
            return text
        case items.InputImage():
            raise InvalidRequest(f"{place}: images may stand in user messages and tool results only", param=place)
        case items.InputFile():
            raise InvalidRequest(f"{place}: files are not supported", param=place)


def without_old_reasoning(placed: Sequence[Placed]) -> list[Placed]:
    """Reasoning of the current turn only: what stands after the last message that is not the assistant's."""
    last = max((i for i, p in enumerate(placed) if isinstance(p.item, items.Message) and p.item.role != "assistant"),
               default=-1)  # fmt: skip
    return [p for i, p in enumerate(placed) if i > last or not isinstance(p.item, items.Reasoning)]


def without_oldest(placed: Sequence[Placed], num_dropped: int) -> list[Placed]:
    """The conversation without its first items, and without results whose call went with them."""
    kept = list(placed[num_dropped:])
    gone = set()
    for entry in placed[:num_dropped]:
        item = entry.item
        if isinstance(item, items.Call):
            gone.update({item.call_id, item.id})
    return [
        p for p in kept if not (isinstance(p.item, items.CallOutput) and {p.item.call_id, p.item.id} & (gone - {None}))
    ]


def as_dicts(parsed: Sequence[AnyItem]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.to_builtins(list(parsed))
    return found
