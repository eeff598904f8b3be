"""Items as the chat messages that templates know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

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
        InvalidRequest: an image or a file, a result without its call, or content that is not this server's.
    """
    writer = _Writer(unsealer)
    if instructions:
        writer.messages.append(ChatMessage(role="system", content=instructions))
    for entry in placed:
        writer.add(entry.item, entry.place)
    writer.end_turn()
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

    def add(self, item: AnyItem, place: str) -> None:
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
        self.messages.append(
            ChatMessage(
                role="tool", content=_result(item, place), tool_call_id=self._call_ids[given], name=self._names[given]
            )
        )


SUMMARY_HEAD = "Summary of the conversation before this point:"


def _result(item: items.CallOutput, place: str) -> str:
    match item:
        case items.ShellCallOutput():
            return tools.shell_result(item.output)
        case items.ApplyPatchCallOutput():
            return f"Error: {item.output or ''}" if item.status == "failed" else item.output or "Done."
        case _:
            return item.output if isinstance(item.output, str) else _joined(item.output, f"{place}.output")


def _joined(parts: Sequence[items.AnyPart], place: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        where = f"{place}[{i}]"
        match part:
            case items.InputText(text=text) | items.OutputText(text=text):
                texts.append(text)
            case items.Refusal(refusal=text):
                texts.append(text)
            case items.InputImage():
                raise InvalidRequest(f"{where}: images are not supported yet", param=where)
            case items.InputFile():
                raise InvalidRequest(f"{where}: files are not supported", param=where)
    return "\n".join(texts)


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
