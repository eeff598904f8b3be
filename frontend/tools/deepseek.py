"""DeepSeek: V3 writes the arguments in a fenced block after "function", V3.1 right after the name."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import NEWLINE, CallSyntax, CallTool, Rules, each, one_or_more
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


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    """Both versions' way: the model takes the one that its template taught it."""

    def write(tool: CallTool) -> str:
        arguments = rules.json(tool.parameters, is_strict=tool.is_strict)
        fenced = f"{rules.literal(f'function{_SEPARATOR}{tool.name}' + NEWLINE + '```json' + NEWLINE)} {arguments}"
        return (
            f"{rules.literal(tool.name + _SEPARATOR)} {arguments} {rules.literal(_END)}"
            f" | {fenced} {rules.literal(NEWLINE + '```' + _END)}"
        )

    body = f"{rules.literal(_START)} {each(rules, tools, write)}"
    rest = f"{one_or_more(rules, body, rules.literal(NEWLINE) + '?', is_single)} {rules.literal(_SECTION_END)}"
    return CallSyntax(_SECTION, rest, f"{rules.literal(_SECTION)} {rest}")


FORMAT = ToolFormat(
    name="deepseek",
    starts=(_START,),
    read=_read,
    grammar=_grammar,
    frames=(_SECTION, _SECTION_END),
    inner=(_SEPARATOR, _END),
)
