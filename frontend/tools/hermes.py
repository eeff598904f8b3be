"""Hermes and Qwen 2.5/3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.json_call import read_json_call
from frontend.tools.sink import Sink

_END = "</tool_call>"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    yield from read_json_call(cursor, sink)
    yield from cursor.skip_space()
    if not (yield from cursor.at_end()):  # an end token may stand for the end marker
        yield from cursor.expect(_END)
    sink.end()


FORMAT = ToolFormat(name="hermes", starts=("<tool_call>",), read=_read, inner=(_END,))
