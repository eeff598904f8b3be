"""MiniMax M2: <invoke name="f"><parameter name="key">value</parameter></invoke> within <minimax:tool_call>."""

from __future__ import annotations

from collections.abc import Sequence

from frontend.tools.calls import CallSyntax, CallTool, Rules, each, one_or_more
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.format import ToolFormat
from frontend.tools.sink import Sink
from frontend.tools.written_grammar import written_parameters
from frontend.tools.written_values import Arguments

_INVOKE = "<invoke name="
_SECTION, _SECTION_END = "<minimax:tool_call>", "</minimax:tool_call>"


def _read(cursor: Cursor, sink: Sink, _start: str) -> Steps[None]:
    name = _unquoted((yield from cursor.take_until(">")))
    arguments = Arguments(sink, name)
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.sees("</invoke>")):
            break
        yield from cursor.expect("<parameter name=")
        key = _unquoted((yield from cursor.take_until(">")))
        value = yield from cursor.take_until("</parameter>")
        arguments.add_text(key, value.removeprefix("\n").removesuffix("\n"))
    arguments.end()
    sink.end()


def _unquoted(name: str) -> str:
    name = name.strip().strip("\"'")
    if not name or "\n" in name:
        raise Malformed("no name")
    return name


def _grammar(rules: Rules, tools: Sequence[CallTool], is_single: bool) -> CallSyntax:
    def write(tool: CallTool) -> str:
        values = written_parameters(
            rules,
            tool,
            head=lambda name: f'<parameter name="{name}">',
            end="</parameter>",
            tail="\n",
            strips_newlines=True,
            pads=False,
        )
        head = rules.literal(f'{_INVOKE}"{tool.name}">\n')
        return f"{head} {values} {rules.literal('</invoke>')}"

    calls = one_or_more(rules, each(rules, tools, write), rules.literal("\n"), is_single)
    # The newline by itself: a lexeme that goes on with the end marker would hide the one before a further call.
    newline = rules.literal("\n")
    rest = f"{newline} {calls} {newline} {rules.literal(_SECTION_END)}"
    return CallSyntax(_SECTION, rest, f"{rules.literal(_SECTION)} {rest}")


FORMAT = ToolFormat(name="minimax", starts=(_INVOKE,), read=_read, grammar=_grammar, frames=(_SECTION, _SECTION_END))
