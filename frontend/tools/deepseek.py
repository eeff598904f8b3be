"""DeepSeek: V3 writes the arguments in a fenced block after "function", V3.1 right after the name."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.json_call import read_arguments
from frontend.tools.sink import Sink

_START, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    name = (yield from cursor.take_until(_SEPARATOR)).strip()
    is_fenced = name == "function" and (yield from cursor.peek()) != "{"
    if is_fenced:
        name = (yield from cursor.take_until("\n")).strip()
        yield from cursor.skip_space()
        yield from cursor.expect("```json")
    if not name or "\n" in name:
        raise Malformed("a call without a name")
    sink.begin(name)
    yield from read_arguments(cursor, sink)
    yield from cursor.skip_space()
    if is_fenced:
        yield from cursor.expect("```")
        yield from cursor.skip_space()
    if not (yield from cursor.at_end()):
        yield from cursor.expect(_END)
    sink.end()


FORMAT = ToolFormat(
    name="deepseek", starts=(_START,), read=_read, frames=(_SECTION, _SECTION_END), inner=(_SEPARATOR, _END)
)
