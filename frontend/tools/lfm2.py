"""LFM2: Python calls in a list, <|tool_call_start|>[name(key="value", other=2)]<|tool_call_end|>."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from frontend.tools.calls import PYTHON_ESCAPES, CallSyntax, CallTool, Rules, each, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.schema import parameters, standing_alone
from frontend.tools.sequence import separated
from frontend.tools.sink import Sink
from frontend.tools.wide_numbers import read_python
from frontend.tools.written_values import Arguments

_START, _END = "<|tool_call_start|>", "<|tool_call_end|>"
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    yield from cursor.skip_space()
    yield from cursor.expect("[")
    while True:
        name = yield from _read_name(cursor, "(")
        arguments = Arguments(sink, name)
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.sees(")")):
                break
            key = yield from _read_name(cursor, "=")
            arguments.add(key, (yield from _read_literal(cursor)))
            yield from cursor.sees(",")
        arguments.end()
        sink.end()
        yield from cursor.skip_space()
        if (yield from cursor.sees("]")):
            break
        yield from cursor.expect(",")
    yield from cursor.skip_space()
    yield from cursor.sees(_END)
    cursor.mark = cursor.pos


def _read_name(cursor: Cursor, end: str) -> Steps[str]:
    name = (yield from cursor.take_until(end)).strip()
    if not _NAME.fullmatch(name):
        raise Malformed("no name")
    return name


def _read_literal(cursor: Cursor) -> Steps[Any]:
    """A Python literal, up to a comma or parenthesis that does not belong to it."""
    start = cursor.pos
    expected: list[str] = []
    quote = ""
    while True:
        char = yield from cursor.peek()
        if not char:
            raise Malformed("a value without an end")
        if quote:
            if char == "\\" and len((yield from cursor.peek(2))) == 2:
                cursor.pos += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in _CLOSING:
            expected.append(_CLOSING[char])
        elif expected and char == expected[-1]:
            expected.pop()
        elif not expected and char in ",)":
            break
        cursor.pos += 1
    text = cursor.text[start : cursor.pos].strip()
    try:
        return read_python(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise Malformed("not a Python literal") from error


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    """Values are JSON as far as it is Python too; the parser takes JSON's words for Python's."""

    def write(tool: CallTool) -> str:
        members = []
        for name in (tool.name, *(p.name for p in parameters(tool))):
            if not _NAME.fullmatch(name):
                raise tool.refuse(f"{name!r} cannot be a name in this model's calls")
        for parameter in parameters(tool):
            schema = standing_alone(tool, parameter.schema)
            value = rules.json(schema, is_strict=tool.is_strict, escapes=PYTHON_ESCAPES)
            members.append((f"{rules.literal(parameter.name + '=')} {value}", parameter.is_required))
        return f"{rules.literal(tool.name + '(')} {separated(rules, members, ', ')} {rules.literal(')')}"

    calls = one_or_more(rules, each(rules, tools, write), rules.literal(", "), is_single)
    rest = f"{rules.literal('[')} {calls} {rules.literal(']' + _END)}"
    return CallSyntax(_START, rest, f"{rules.literal(_START)} {rest}")


FORMAT = ToolFormat(name="lfm2", starts=(_START,), read=_read, grammar=_grammar, inner=(_END,))
