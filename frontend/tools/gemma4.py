"""Gemma 4: <|tool_call>call:name{key:<|"|>text<|"|>,other:[1,true]}<tool_call|>."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from frontend.tools.calls import CallSyntax, CallTool, Rules, each, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.gemma4_grammar import arguments
from frontend.tools.json_value import MAX_DEPTH
from frontend.tools.sink import Sink
from frontend.tools.written_values import Arguments, typed

_START, _END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_NAME = re.compile(r"[\w.-]+")


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    yield from cursor.skip_space()
    yield from cursor.expect("call:")
    name = (yield from cursor.take_until("{")).strip()
    if not _NAME.fullmatch(name):
        raise Malformed("a call without a name")
    arguments = Arguments(sink, name)
    yield from _read_members(cursor, arguments.add, 0)
    arguments.end()
    yield from cursor.skip_space()
    if not (yield from cursor.at_end()):
        yield from cursor.expect(_END)
    sink.end()


def _read_members(cursor: Cursor, add: Any, depth: int) -> Steps[None]:  # noqa: ANN401 - (key, value) -> anything
    """Up to and with the closing brace."""
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.sees("}")):
            return
        if (yield from cursor.sees(_QUOTE)):
            key = yield from cursor.take_until(_QUOTE)
            yield from cursor.expect(":")
        else:
            key = (yield from cursor.take_until(":")).strip().strip('"')
        add(key, (yield from _read_value(cursor, depth + 1)))
        yield from cursor.skip_space()
        if not (yield from cursor.sees(",")) and (yield from cursor.peek()) != "}":
            raise Malformed("expected a comma or a brace")


def _read_value(cursor: Cursor, depth: int) -> Steps[Any]:
    if depth > MAX_DEPTH:
        raise Malformed("the arguments are nested too deeply")
    yield from cursor.skip_space()
    if (yield from cursor.sees(_QUOTE)):
        return (yield from cursor.take_until(_QUOTE))
    if (yield from cursor.sees("{")):
        members: dict[str, Any] = {}
        yield from _read_members(cursor, members.__setitem__, depth)
        return members
    if (yield from cursor.sees("[")):
        items: list[Any] = []
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.sees("]")):
                return items
            items.append((yield from _read_value(cursor, depth + 1)))
            yield from cursor.skip_space()
            if not (yield from cursor.sees(",")) and (yield from cursor.peek()) != "]":
                raise Malformed("expected a comma or a bracket")
    start = cursor.pos
    while (char := (yield from cursor.peek())) not in (",", "}", "]", "{", "[", ""):
        if char == "<":
            raise Malformed("a marker inside a value")
        cursor.pos += 1
    text = cursor.text[start : cursor.pos].strip()
    if not text:
        raise Malformed("a key without a value")
    return typed(text, None)


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    def write(tool: CallTool) -> str:
        if not _NAME.fullmatch(tool.name):
            raise tool.refuse(f"{tool.name!r} cannot be a name in this model's calls")
        return f"{rules.literal(f'call:{tool.name}')} {arguments(rules, tool, _QUOTE)}"

    body = f"{each(rules, tools, write)} {rules.literal(_END)}"
    rest = one_or_more(rules, body, rules.literal(_START), is_single)
    return CallSyntax(_START, rest, f"{rules.literal(_START)} {rest}")


FORMAT = ToolFormat(name="gemma4", starts=(_START,), read=_read, grammar=_grammar, inner=(_END, _QUOTE))
