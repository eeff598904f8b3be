"""GLM-4.5 and later, LongCat: <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import Sink
from frontend.tools.written_values import Arguments


def tagged(name: str, prefix: str) -> ToolFormat:
    """The format with `prefix` in front of each tag's name."""
    start, end = f"<{prefix}tool_call>", f"</{prefix}tool_call>"
    key_start, key_end = f"<{prefix}arg_key>", f"</{prefix}arg_key>"
    value_start, value_end = f"<{prefix}arg_value>", f"</{prefix}arg_value>"

    def read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
        tool = ""
        while (char := (yield from cursor.peek())) not in ("<", ""):
            tool += char
            cursor.pos += 1
        tool = tool.strip()
        if not tool or "\n" in tool or "{" in tool:
            raise Malformed("a call without a name")
        if not (yield from cursor.peek()):
            raise Malformed("a call without an end")
        arguments = Arguments(sink, tool)
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.sees(end)):
                break
            yield from cursor.expect(key_start)
            key = (yield from cursor.take_until(key_end)).strip()
            yield from cursor.skip_space()
            yield from cursor.expect(value_start)
            arguments.add_text(key, (yield from cursor.take_until(value_end)))
        arguments.end()
        sink.end()

    return ToolFormat(name=name, starts=(start,), read=read, inner=(end, key_start, key_end, value_start, value_end))


FORMAT = tagged("glm4", "")
LONGCAT = tagged("longcat", "longcat_")
