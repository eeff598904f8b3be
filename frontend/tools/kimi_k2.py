"""Kimi K2: <|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{...}<|tool_call_end|>, in a section."""

from __future__ import annotations

import re
from collections.abc import Sequence

from frontend.tools.calls import CallSyntax, CallTool, Rules, each, one_or_more
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


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    def write(tool: CallTool) -> str:
        head = f"{rules.literal(f'functions.{tool.name}:')} /[0-9]{{1,3}}/ {rules.literal(_ARGUMENTS)}"
        return f"{head} {rules.json(tool.parameters, is_strict=tool.is_strict)}"

    body = f"{rules.literal(_START)} {each(rules, tools, write)} {rules.literal(_END)}"
    rest = f"{one_or_more(rules, body, '', is_single)} {rules.literal(_SECTION_END)}"
    return CallSyntax(_SECTION, rest, f"{rules.literal(_SECTION)} {rest}")


FORMAT = ToolFormat(
    name="kimi_k2",
    starts=(_START,),
    read=_read,
    grammar=_grammar,
    frames=(_SECTION, _SECTION_END),
    inner=(_ARGUMENTS, _END),
    history_id=counted_id,
)
