"""Where a parser puts what it finds."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from frontend.output_events import CallArguments, CallEnd, CallFailed, CallStart, Event, Reasoning, Text
from frontend.tools.cursor import Cursor, Malformed, Steps


class EnoughCalls(Exception):
    """Not an error: the request wants one call only, and it is complete. The output parser ends the output with it."""


class Sink:
    """Events in order. Tells tool parsers the parameters that the request's tools have.

    Space around calls and reasoning is layout, not text: it is held back until the text goes on.

    Args:
        tools: tool name -> JSON schema of its parameters.
        max_calls: None for no limit.
    """

    def __init__(self, cursor: Cursor, tools: Mapping[str, dict[str, Any]], max_calls: int | None) -> None:
        self.tools = tools
        self.events: list[Event] = []
        self.num_complete = 0
        self.num_failed = 0
        self.open_index: int | None = None
        self._max_calls = max_calls
        self._cursor = cursor
        self._num_begun = 0
        self._space = ""
        self._is_at_edge = False

    # ------------------------------------------------------------ text

    def text(self, text: str) -> None:
        body = self._without_space(text)
        if body:
            self._put(Text(body))

    def reasoning(self, text: str) -> None:
        body = self._without_space(text)
        if body:
            self._put(Reasoning(body))

    def _put(self, event: Text | Reasoning) -> None:
        last = self.events[-1] if self.events else None
        if type(last) is type(event):
            self.events[-1] = type(event)(last.text + event.text)
        else:
            self.events.append(event)

    def _without_space(self, text: str) -> str:
        text = self._space + text
        if self._is_at_edge:
            text = text.lstrip()
        body = text.rstrip()
        self._space = text[len(body) :]
        self._is_at_edge = self._is_at_edge and not body
        return body

    def end_part(self) -> None:
        """Reasoning or a call begins or ends here: space before and after it is dropped."""
        self._space = ""
        self._is_at_edge = True

    def flush(self) -> None:
        """The output ends: space that was held back belongs to its text."""
        if self._space:
            self._put(Text(self._space))
            self._space = ""

    # ------------------------------------------------------------ calls

    def begin(self, name: str) -> None:
        self.open_index = self._num_begun
        self._num_begun += 1
        name = name.encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent
        self.events.append(CallStart(self.open_index, f"call_{uuid.uuid4().hex[:24]}", name))

    def arguments(self, json: str) -> None:
        assert self.open_index is not None, "begun"
        last = self.events[-1] if self.events else None
        if isinstance(last, CallArguments):
            self.events[-1] = CallArguments(last.index, last.json + json)
        else:
            self.events.append(CallArguments(self.open_index, json))

    def end(self) -> None:
        """The call is complete: what fails after this does not take it back."""
        assert self.open_index is not None, "begun"
        self.events.append(CallEnd(self.open_index))
        self.open_index = None
        self.num_complete += 1
        self._cursor.mark = self._cursor.pos
        self.end_part()
        if self.num_complete == self._max_calls:
            raise EnoughCalls

    def fail(self, error: Malformed) -> None:
        """What the cursor has read since its mark is no call after all, but text."""
        raw = self._cursor.text[self._cursor.mark : self._cursor.pos]
        if error.is_call and raw.strip():
            self.num_failed += 1
        if self.open_index is None:
            self.text(raw)
        else:
            self.events.append(CallFailed(self.open_index, self._space + raw))
            self._space = ""
            self._is_at_edge = False
            self.open_index = None
        self._cursor.mark = self._cursor.pos


@lru_cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)))


def read_text(cursor: Cursor, write: Callable[[str], None], markers: Sequence[str]) -> Steps[str | None]:
    """Pass text on until a marker, which is returned and comes next, or until the end (None).

    Only what may be the beginning of a marker is held back.
    """
    pattern = _pattern(tuple(markers))
    while True:
        found = pattern.search(cursor.text, cursor.pos)
        if found is not None:
            end = found.start()
        elif cursor.is_closed:
            end = len(cursor.text)
        else:
            end = len(cursor.text) - max(_overlap(cursor.text, cursor.pos, marker) for marker in markers)
        if end > cursor.pos:
            write(cursor.text[cursor.pos : end])
            cursor.pos = cursor.mark = end
        if found is not None:
            return found.group()
        if cursor.is_closed:
            return None
        yield


def _overlap(text: str, start: int, marker: str) -> int:
    """Length of the longest proper prefix of `marker` that ends text[start:]."""
    for length in range(min(len(marker) - 1, len(text) - start), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0
