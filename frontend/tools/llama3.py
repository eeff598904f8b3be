"""Llama 3: {"name": ..., "parameters": {...}}, alone or after <|python_tag|>; several are divided by semicolons."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import CallSyntax, CallTool, Rules, each, json_call, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.json_call import read_json_call
from frontend.tools.sink import Sink

_TAG = "<|python_tag|>"


def _read(cursor: Cursor, sink: Sink, start: str) -> Steps[None]:
    """Without the tag, an object that names no tool of the request is an answer in JSON."""
    is_tagged = start == _TAG
    while True:
        try:
            yield from read_json_call(cursor, sink, known_only=not is_tagged)
        except Malformed as error:
            if not is_tagged and sink.open_index is None:
                raise Malformed(str(error), is_call=False) from error
            raise
        sink.end()
        yield from cursor.skip_space()
        if not (yield from cursor.sees(";")):
            return
        yield from cursor.skip_space()


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    call = each(rules, tools, lambda tool: json_call(rules, tool, "parameters"))
    calls = rules.add(one_or_more(rules, call, rules.literal("; "), is_single))
    return CallSyntax(_TAG, calls, forced=calls, bare=calls)


FORMAT = ToolFormat(name="llama3", starts=(_TAG,), read=_read, grammar=_grammar, begins_bare=True)
