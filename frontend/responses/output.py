"""An output's pieces as items, and the events that tell of them while they grow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from frontend import logprobs
from frontend.generation import TokenText
from frontend.output_events import CallArguments, CallEnd, CallFailed, CallStart, Event, Reasoning, Text
from frontend.pieces import Pieces
from frontend.responses.freeform import FreeformInput
from frontend.responses.items import ID_PREFIXES
from frontend.responses.tools import Known, ToolTable, custom_input, shell_fields

Json = dict[str, Any]
EndStatus = Literal["completed", "incomplete"]


def new_id(kind: str) -> str:
    return f"{ID_PREFIXES.get(kind, kind)}_{uuid.uuid4().hex}"


class OutputItems:
    """At most one item is open at a time; a piece of another kind closes it.

    Args:
        shows_summary: reasoning is shown as the item's summary instead of its content.
        seal: packs reasoning for clients that keep it; None where none was asked for.
        has_logprobs: text parts carry log-probabilities.
    """

    def __init__(
        self,
        table: ToolTable,
        pieces: Pieces,
        *,
        shows_summary: bool,
        seal: Callable[[str], str] | None,
        has_logprobs: bool,
    ) -> None:
        self.items: list[Json] = []
        self.reasoning_texts: list[str] = []
        self._table = table
        self._pieces = pieces
        self._shows_summary = shows_summary
        self._seal = seal
        self._has_logprobs = has_logprobs
        self._open: _OpenItem | None = None

    def show(self, item: Event, tokens: Sequence[TokenText]) -> list[Json]:
        """Events for one piece. `tokens`: those whose text it is, where log-probabilities were asked for."""
        match item:
            case Text(text):
                if not text:
                    return []
                events = self._switch(_MessageItem)
                return [*events, *self._current(_MessageItem).add(text, self._logprobs(tokens))]
            case Reasoning(text):
                events = self._switch(_ReasoningItem)
                return [*events, *self._current(_ReasoningItem).add(text)]
            case CallStart(_, call_id, name):
                events = self.close()
                tool = self._table.get(name)
                kind = {"function": _FunctionItem, "custom": _CustomItem}.get(tool.kind, _ShellItem)
                return [*events, *self._begin(kind(len(self.items), call_id, tool))]
            case CallArguments(_, json):
                return self._current(_CallItem).add(json)
            case CallEnd():
                return self._end_call()
            case CallFailed(_, raw):
                return [*self._fail_call(), *self.show(Text(raw), tokens)]

    def close(self, status: EndStatus = "completed") -> list[Json]:
        """End the open item, if any."""
        if self._open is None:
            return []
        ended, self._open = self._open, None
        if isinstance(ended, _ReasoningItem):
            self.reasoning_texts.append(ended.text)
        return ended.end(status)

    def without_failed_calls(self) -> list[Json]:
        """For answers that are not streamed: there a malformed call is its text and nothing else."""
        return [item for item in self.items if not (item["type"].endswith("_call") and item["status"] == "incomplete")]

    def _begin(self, item: _OpenItem) -> list[Json]:
        self._open = item
        events = item.begin()
        if events:  # items that begin with their end are listed then
            self.items.append(item.item)
        return events

    def _current(self, kind: type[_SomeItem]) -> _SomeItem:
        assert isinstance(self._open, kind), "begun"
        return self._open

    def _switch(self, kind: type[_MessageItem] | type[_ReasoningItem]) -> list[Json]:
        if isinstance(self._open, kind):
            return []
        events = self.close()
        if kind is _MessageItem:
            return [*events, *self._begin(_MessageItem(len(self.items), has_logprobs=self._has_logprobs))]
        made = _ReasoningItem(len(self.items), shows_summary=self._shows_summary, seal=self._seal)
        return [*events, *self._begin(made)]

    def _end_call(self) -> list[Json]:
        call = self._current(_CallItem)
        if isinstance(call, _ShellItem):
            self._open = None
            if not call.fits():  # arguments that are no command: shown as the text they are
                return self.show(Text(call.arguments), ())
            self.items.append(call.item)
            return call.end("completed")
        return self.close()

    def _fail_call(self) -> list[Json]:
        if isinstance(self._open, _ShellItem):
            self._open = None
            return []
        return self.close("incomplete")

    def _logprobs(self, tokens: Sequence[TokenText]) -> list[Json]:
        return logprobs.chat_entries(tokens, self._pieces) if tokens else []


class _OpenItem:
    """`item` is what clients see at its end; it grows in place."""

    def __init__(self, index: int, item: Json) -> None:
        self.index = index
        self.item = item

    def begin(self) -> list[Json]:
        return [self._event("response.output_item.added", item=dict(self.item))]

    def end(self, status: EndStatus) -> list[Json]:
        self.item["status"] = status
        return [*self._finish(), self._event("response.output_item.done", item=self.item)]

    def _finish(self) -> list[Json]:
        raise NotImplementedError

    def _event(self, kind: str, **fields: object) -> Json:
        return {"type": kind, "output_index": self.index, **fields}

    def _inner(self, kind: str, **fields: object) -> Json:
        return {"type": kind, "item_id": self.item["id"], "output_index": self.index, **fields}


class _MessageItem(_OpenItem):
    def __init__(self, index: int, *, has_logprobs: bool) -> None:
        head = {"id": new_id("message"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        super().__init__(index, head)
        self._has_logprobs = has_logprobs
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def _part(self) -> Json:
        part: Json = {"type": "output_text", "text": "".join(self._texts), "annotations": []}
        return part | {"logprobs": self._logprobs} if self._has_logprobs else part

    def begin(self) -> list[Json]:
        return [
            *super().begin(),
            self._inner("response.content_part.added", content_index=0, part=self._part() | {"logprobs": []}),
        ]

    def add(self, text: str, entries: list[Json]) -> list[Json]:
        self._texts.append(text)
        self._logprobs += entries
        return [self._inner("response.output_text.delta", content_index=0, delta=text, logprobs=entries)]

    def _finish(self) -> list[Json]:
        part = self._part()
        self.item["content"] = [part]
        done = {"content_index": 0, "text": part["text"], "logprobs": self._logprobs}
        return [
            self._inner("response.output_text.done", **done),
            self._inner("response.content_part.done", content_index=0, part=part),
        ]


class _ReasoningItem(_OpenItem):
    def __init__(self, index: int, *, shows_summary: bool, seal: Callable[[str], str] | None) -> None:
        super().__init__(
            index, {"id": new_id("reasoning"), "type": "reasoning", "status": "in_progress", "summary": []}
        )
        self._shows_summary = shows_summary
        self._seal = seal
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def _part(self) -> Json:
        return {"type": "summary_text" if self._shows_summary else "reasoning_text", "text": self.text}

    def begin(self) -> list[Json]:
        if self._shows_summary:
            part = self._inner("response.reasoning_summary_part.added", summary_index=0, part=self._part())
        else:
            part = self._inner("response.content_part.added", content_index=0, part=self._part())
        return [*super().begin(), part]

    def add(self, text: str) -> list[Json]:
        self._texts.append(text)
        if self._shows_summary:
            return [self._inner("response.reasoning_summary_text.delta", summary_index=0, delta=text)]
        return [self._inner("response.reasoning_text.delta", content_index=0, delta=text)]

    def _finish(self) -> list[Json]:
        part = self._part()
        if self._seal is not None:
            self.item["encrypted_content"] = self._seal(self.text)
        if self._shows_summary:
            self.item["summary"] = [part]
            return [
                self._inner("response.reasoning_summary_text.done", summary_index=0, text=self.text),
                self._inner("response.reasoning_summary_part.done", summary_index=0, part=part),
            ]
        self.item["content"] = [part]
        return [
            self._inner("response.reasoning_text.done", content_index=0, text=self.text),
            self._inner("response.content_part.done", content_index=0, part=part),
        ]


class _CallItem(_OpenItem):
    def __init__(self, index: int, call_id: str, tool: Known, kind: str, **fields: object) -> None:
        head: Json = {"id": new_id(kind), "type": kind, "status": "in_progress", "call_id": call_id, **fields}
        if tool.namespace is not None:
            head["namespace"] = tool.namespace
        super().__init__(index, head)
        self._jsons: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self._jsons)

    def add(self, json: str) -> list[Json]:
        self._jsons.append(json)
        return []


class _FunctionItem(_CallItem):
    def __init__(self, index: int, call_id: str, tool: Known) -> None:
        super().__init__(index, call_id, tool, "function_call", name=tool.name, arguments="")

    def add(self, json: str) -> list[Json]:
        super().add(json)
        return [self._inner("response.function_call_arguments.delta", delta=json)]

    def _finish(self) -> list[Json]:
        self.item["arguments"] = self.arguments
        return [self._inner("response.function_call_arguments.done", arguments=self.arguments, name=self.item["name"])]


class _CustomItem(_CallItem):
    """A freeform tool's call. What was streamed of its input is the beginning of the input at its end."""

    def __init__(self, index: int, call_id: str, tool: Known) -> None:
        super().__init__(index, call_id, tool, "custom_tool_call", name=tool.name, input="")
        self._freeform = FreeformInput()
        self._streamed = ""

    def add(self, json: str) -> list[Json]:
        super().add(json)
        return self._delta(self._freeform.feed(json))

    def _delta(self, text: str) -> list[Json]:
        self._streamed += text
        return [self._inner("response.custom_tool_call_input.delta", delta=text)] if text else []

    def _finish(self) -> list[Json]:
        if self.item["status"] == "incomplete":
            text, rest = self._streamed, []
        else:
            text = self._streamed or custom_input(self.arguments)
            rest = self._delta(text[len(self._streamed) :])
        self.item["input"] = text
        return [*rest, self._inner("response.custom_tool_call_input.done", input=text)]


class _ShellItem(_CallItem):
    """A shell's or a patch's call: it has no deltas, so it is shown when it is complete and fits its shape."""

    def __init__(self, index: int, call_id: str, tool: Known) -> None:
        super().__init__(index, call_id, tool, f"{tool.kind}_call")
        self._tool = tool

    def begin(self) -> list[Json]:
        return []

    def fits(self) -> bool:
        fields = shell_fields(self._tool.kind, self.arguments)
        if fields is None:
            return False
        self.item |= fields
        return True

    def _finish(self) -> list[Json]:
        return [self._event("response.output_item.added", item=self.item | {"status": "in_progress"})]


_SomeItem = TypeVar("_SomeItem", bound=_OpenItem)
