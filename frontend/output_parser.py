"""One output's text, as it arrives, to events: reasoning, text, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from tokenizers import Tokenizer

from frontend import reasoning, tools
from frontend.output_events import Event
from frontend.reasoning import ReasoningFormat
from frontend.tools import harmony
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import EnoughCalls, Sink, read_text
from shared.config import Settings


class OutputFormat(Struct, frozen=True, kw_only=True):
    """What a model's outputs may contain besides text. Chosen once, at start-up."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None
    is_harmony: bool

    @property
    def has_tools(self) -> bool:
        return self.tools is not None or self.is_harmony


def choose(settings: Settings, template: str | None, tokenizer: Tokenizer) -> OutputFormat:
    """Raises BadConfig for a name that is no parser's."""
    tool_name = tools.choose(settings.tool_parser, template or "")
    return OutputFormat(
        tools=tools.get(tool_name) if tool_name is not None else None,
        reasoning=reasoning.choose(
            settings.reasoning_parser,
            template or "",
            tokenizer,
            settings.thinking_start_token,
            settings.thinking_end_token,
        ),
        is_harmony=tool_name == harmony.NAME,
    )


class Request(Struct, frozen=True, kw_only=True):
    """What one HTTP request asks of the parsers of its outputs.

    `tools` maps names to parameter schemas; None: calls are not wanted, and what looks like one is text.
    """

    output_format: OutputFormat
    prompt: str
    tools: Mapping[str, dict[str, Any]] | None = None
    max_calls: int | None = None
    on_failed_call: Callable[[], None] = lambda: None

    @property
    def is_plain(self) -> bool:
        """Nothing to look for: text passes as it is."""
        has_tools = self.tools is not None and self.output_format.has_tools
        return not has_tools and self.output_format.reasoning is None and not self.output_format.is_harmony

    @property
    def markers(self) -> frozenset[str]:
        """Special tokens among these must reach the parser, though clients do not see special tokens."""
        if self.output_format.is_harmony:
            return frozenset(harmony.MARKERS)
        marks: set[str] = set()
        if self.tools is not None and self.output_format.tools is not None:
            marks.update(self.output_format.tools.markers)
        if self.output_format.reasoning is not None:
            marks.add(self.output_format.reasoning.start)
            marks.add(self.output_format.reasoning.end)
            marks.add(self.output_format.reasoning.start.removesuffix("thought\n"))  # Gemma's token is shorter
        return frozenset(marks)


class OutputParser:
    """Feed it text in pieces of any size, then close it. `is_done` once the wanted number of calls is complete."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._cursor = Cursor()
        self._sink = Sink(self._cursor, request.tools or {}, request.max_calls)
        self.is_done = False
        self._steps = self._read()
        self._num_told = 0

    @property
    def num_calls(self) -> int:
        return self._sink.num_complete

    def feed(self, text: str) -> list[Event]:
        if self.is_done or not text:
            return []
        self._cursor.push(text)
        return self._advance()

    def close(self) -> list[Event]:
        """The output has ended; what was held back comes out."""
        if self.is_done:
            return []
        self._cursor.is_closed = True
        return self._advance()

    def _advance(self) -> list[Event]:
        try:
            next(self._steps)
        except StopIteration:
            self.is_done = True
        for _ in range(self._sink.num_failed - self._num_told):
            self._request.on_failed_call()
        self._num_told = self._sink.num_failed
        events, self._sink.events = self._sink.events, []
        return events

    def _read(self) -> Steps[None]:
        wants_tools = self._request.tools is not None
        try:
            if self._request.output_format.is_harmony:
                yield from harmony.read_output(self._cursor, self._sink, has_tools=wants_tools)
            else:
                if self._request.output_format.reasoning is not None:
                    yield from self._read_reasoning(self._request.output_format.reasoning)
                yield from self._read_text(self._request.output_format.tools if wants_tools else None)
            self._sink.flush()
        except EnoughCalls:
            pass

    def _read_reasoning(self, marks: ReasoningFormat) -> Steps[None]:
        """Reasoning stands at the very beginning; a marker later on is text that mentions it."""
        cursor = self._cursor
        if not marks.is_open(self._request.prompt):
            yield from cursor.skip_space()
            if not (yield from cursor.sees(marks.start)):
                cursor.pos = 0  # nothing was shown yet, so the space is still there
                return
        self._sink.end_part()
        if (yield from read_text(cursor, self._sink.reasoning, (marks.end,))) is not None:
            cursor.pos += len(marks.end)
        self._sink.end_part()

    def _read_text(self, form: ToolFormat | None) -> Steps[None]:
        cursor, sink = self._cursor, self._sink
        if form is None:
            while not (yield from cursor.at_end()):
                sink.text(cursor.text[cursor.pos :])
                cursor.pos = cursor.mark = len(cursor.text)
            return
        if form.begins_bare:
            start = cursor.pos
            yield from cursor.skip_space()
            if (yield from cursor.peek()) == "{":
                yield from self._read_call(form, "")
            else:
                cursor.pos = start
        while (marker := (yield from read_text(cursor, sink.text, (*form.starts, *form.frames)))) is not None:
            if marker in form.frames:
                cursor.pos += len(marker)
                cursor.mark = cursor.pos
            else:
                yield from self._read_call(form, marker)

    def _read_call(self, form: ToolFormat, marker: str) -> Steps[None]:
        self._cursor.mark = self._cursor.pos
        self._cursor.pos += len(marker)
        try:
            yield from form.read(self._cursor, self._sink, marker)
        except Malformed as error:
            self._sink.fail(error)
