"""GLM-4.5 and later, LongCat: <tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import NEWLINE, CallSyntax, CallTool, Rules, each, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import Sink
from frontend.tools.written_grammar import written_parameters
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

    def grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
        def write(tool: CallTool) -> str:
            values = written_parameters(
                rules,
                tool,
                head=lambda key: f"{key_start}{key}{key_end}\n{value_start}",
                end=value_end,
                tail="\n",
                strips_newlines=False,
                pads=False,
            )
            return f"{rules.literal(tool.name + NEWLINE)} {values}"

        body = f"{each(rules, tools, write)} {rules.literal(end)}"
        rest = one_or_more(rules, body, rules.literal(f"\n{start}"), is_single)
        return CallSyntax(start, rest, f"{rules.literal(start)} {rest}")

    inner = (end, key_start, key_end, value_start, value_end)
    return ToolFormat(name=name, starts=(start,), read=read, grammar=grammar, inner=inner)


FORMAT = tagged("glm4", "")
LONGCAT = tagged("longcat", "longcat_")
