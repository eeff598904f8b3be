"""Qwen3-Coder, Qwen3.5 and later: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import NEWLINE, CallSyntax, CallTool, Rules, each, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import Sink
from frontend.tools.written_grammar import written_parameters
from frontend.tools.written_values import Arguments

_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"


def _read(cursor: Cursor, sink: Sink, start: str) -> Steps[None]:
    if start == _CALL:
        yield from cursor.skip_space()
        yield from cursor.expect(_FUNCTION)
    name = (yield from cursor.take_until(">")).strip()
    if not name or "\n" in name:
        raise Malformed("a call without a name")
    arguments = Arguments(sink, name)
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.sees(_FUNCTION_END)):
            break
        yield from cursor.expect("<parameter=")
        key = (yield from cursor.take_until(">")).strip()
        value = yield from cursor.take_until("</parameter>")
        arguments.add_text(key, value.removeprefix("\n").removesuffix("\n"))
    arguments.end()
    if start == _CALL:
        yield from cursor.skip_space()
        if not (yield from cursor.at_end()):
            yield from cursor.expect(_CALL_END)
    sink.end()


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    def write(tool: CallTool) -> str:
        values = written_parameters(
            rules,
            tool,
            head=lambda name: f"<parameter={name}>",
            end="</parameter>",
            tail="\n",
            strips_newlines=True,
            pads=True,
        )
        return f"{rules.literal(f'{_FUNCTION}{tool.name}>' + NEWLINE)} {values} {rules.literal(_FUNCTION_END)}"

    body = f"{rules.literal(NEWLINE)} {each(rules, tools, write)} {rules.literal(NEWLINE + _CALL_END)}"
    rest = one_or_more(rules, body, rules.literal(f"\n{_CALL}"), is_single)
    return CallSyntax(_CALL, rest, f"{rules.literal(_CALL)} {rest}")


FORMAT = ToolFormat(
    name="qwen3_coder",
    starts=(_CALL, _FUNCTION),  # these models sometimes leave the outer marker out
    read=_read,
    grammar=_grammar,
    inner=(_CALL_END, _FUNCTION_END),
)
