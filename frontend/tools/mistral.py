"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and later [TOOL_CALLS]name[CALL_ID]id[ARGS]{...}."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import CallSyntax, CallTool, Rules, each, json_call, one_or_more
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


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    """The vocabulary tells the version: [ARGS] came with the later way of writing."""
    if not rules.is_token(_ARGS):
        call = each(rules, tools, lambda tool: json_call(rules, tool))
        rest = f'"[" {one_or_more(rules, call, chr(34) + ", " + chr(34), is_single)} "]"'
        return CallSyntax(_START, rest, f"{rules.literal(_START)} {rest}")
    call_id = f"({rules.literal(_CALL_ID)} /[a-zA-Z0-9]{{9}}/)? " if rules.is_token(_CALL_ID) else ""

    def write(tool: CallTool) -> str:
        arguments = rules.json(tool.parameters, is_strict=tool.is_strict)
        return f"{rules.literal(tool.name)} {call_id}{rules.literal(_ARGS)} {arguments}"

    rest = one_or_more(rules, each(rules, tools, write), rules.literal(_START), is_single)
    return CallSyntax(_START, rest, f"{rules.literal(_START)} {rest}")


FORMAT = ToolFormat(
    name="mistral", starts=(_START,), read=_read, grammar=_grammar, inner=(_ARGS, _CALL_ID), history_id=short_id
)
