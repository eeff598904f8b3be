"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and later [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat, short_id
from frontend.tools.json_call import read_arguments, read_json_call
from frontend.tools.sink import Sink

_START, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    yield from cursor.skip_space()
    if (yield from cursor.sees("[")):
        yield from _read_list(cursor, sink)
    elif (yield from cursor.peek()) == "{":
        yield from read_json_call(cursor, sink)
        sink.end()
    else:
        name = yield from _read_name(cursor)
        sink.begin(name)
        yield from read_arguments(cursor, sink)
        sink.end()


def _read_list(cursor: Cursor, sink: Sink) -> Steps[None]:
    while True:
        yield from read_json_call(cursor, sink)
        sink.end()
        yield from cursor.skip_space()
        if (yield from cursor.sees("]")) or (yield from cursor.at_end()):
            cursor.mark = cursor.pos
            return
        yield from cursor.expect(",")


def _read_name(cursor: Cursor) -> Steps[str]:
    """The name before [ARGS]; some versions write {...} right after the name."""
    name = ""
    while True:
        char = yield from cursor.peek()
        if char in ("[", "{", ""):
            break
        if not (char.isalnum() or char in "_-. \n"):
            raise Malformed("no tool's name")
        name += char
        cursor.pos += 1
    if (yield from cursor.sees(_CALL_ID)):
        yield from cursor.take_until(_ARGS)
    elif (yield from cursor.peek()) != "{":
        yield from cursor.expect(_ARGS)
    if not name.strip():
        raise Malformed("a call without a name")
    return name.strip()


FORMAT = ToolFormat(name="mistral", starts=(_START,), read=_read, inner=(_ARGS, _CALL_ID), history_id=short_id)
