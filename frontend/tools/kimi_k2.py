"""Kimi K2: <|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>, in a section."""

from __future__ import annotations

import re

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat, counted_id
from frontend.tools.json_call import read_arguments
from frontend.tools.sink import Sink

_START, _ARGUMENTS, _END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ID = re.compile(r"(?:functions\.)?([^\s:]+)(?::\d+)?")


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    found = _ID.fullmatch((yield from cursor.take_until(_ARGUMENTS)).strip())
    if found is None:
        raise Malformed("a call without a name")
    sink.begin(found.group(1))
    yield from read_arguments(cursor, sink)
    yield from cursor.skip_space()
    if not (yield from cursor.at_end()):
        yield from cursor.expect(_END)
    sink.end()


FORMAT = ToolFormat(
    name="kimi_k2",
    starts=(_START,),
    read=_read,
    frames=(_SECTION, _SECTION_END),
    inner=(_ARGUMENTS, _END),
    history_id=counted_id,
)
