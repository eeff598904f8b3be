"""Hermes and Qwen 2.5/3: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import NEWLINE, CallSyntax, CallTool, Rules, each, json_call, one_or_more
from frontend.tools.cursor import Cursor, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.json_call import read_json_call
from frontend.tools.sink import Sink

_START, _END = "<tool_call>", "</tool_call>"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    yield from read_json_call(cursor, sink)
    yield from cursor.skip_space()
    if not (yield from cursor.at_end()):  # an end token may stand for the end marker
        yield from cursor.expect(_END)
    sink.end()


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    call = each(rules, tools, lambda tool: json_call(rules, tool))
    body = f"{rules.literal(NEWLINE)} {call} {rules.literal(NEWLINE + _END)}"
    between = rules.literal(f"\n{_START}")
    rest = one_or_more(rules, body, between, is_single)
    return CallSyntax(_START, rest, f"{rules.literal(_START)} {rest}")


FORMAT = ToolFormat(name="hermes", starts=(_START,), read=_read, grammar=_grammar, inner=(_END,))
