"""MiniMax M2: <invoke name="f"><parameter name="key">value</parameter></invoke> within <minimax:tool_call>."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import Sink
from frontend.tools.written_values import Arguments

_SECTION, _SECTION_END = "<minimax:tool_call>", "</minimax:tool_call>"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    name = _unquoted((yield from cursor.take_until(">")))
    arguments = Arguments(sink, name)
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.sees("</invoke>")):
            break
        yield from cursor.expect("<parameter name=")
        key = _unquoted((yield from cursor.take_until(">")))
        value = yield from cursor.take_until("</parameter>")
        arguments.add_text(key, value.removeprefix("\n").removesuffix("\n"))
    arguments.end()
    sink.end()


def _unquoted(name: str) -> str:
    name = name.strip().strip("\"'")
    if not name or "\n" in name:
        raise Malformed("no name")
    return name


FORMAT = ToolFormat(name="minimax", starts=("<invoke name=",), read=_read, frames=(_SECTION, _SECTION_END))
