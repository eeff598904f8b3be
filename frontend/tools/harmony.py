"""gpt-oss's harmony: the whole output is messages with a channel (analysis, commentary, final) and maybe a recipient.

Source: OpenAI's description of the harmony response format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from frontend.reasoning import ReasoningFormat
from frontend.tools.calls import CallTool, Rules, any_of, without
from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.json_call import read_arguments
from frontend.tools.sink import Sink, read_text

NAME = "harmony"
_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_RETURN = "<|return|>"
_ENDS = ("<|end|>", "<|call|>", _RETURN)
MARKERS = (_CHANNEL, _MESSAGE, _START, "<|constrain|>", *_ENDS)

REASONING = ReasoningFormat("harmony", f"{_CHANNEL}analysis{_MESSAGE}", "<|end|>")

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(\w+)")


def read_output(cursor: Cursor, sink: Sink, *, has_tools: bool) -> Steps[None]:
    """A whole output. The prompt ends after `<|start|>assistant`, so it begins inside a header."""
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.at_end()):
            return
        cursor.mark = cursor.pos
        if not (yield from _begins_header(cursor)):
            yield from _read_body(cursor, sink, is_reasoning=False)
            continue
        try:
            header = yield from cursor.take_until(_MESSAGE)
        except Malformed:
            sink.text(cursor.text[cursor.pos :])
            cursor.pos = len(cursor.text)
            return
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL_NAME.search(header)
        if recipient is None or not has_tools:
            yield from _read_body(cursor, sink, is_reasoning=channel is not None and channel.group(1) == "analysis")
            continue
        try:
            sink.begin(recipient.group(1))
            yield from read_arguments(cursor, sink)
            yield from cursor.skip_space()
            if not (yield from _sees_end(cursor)):
                raise Malformed("text after the arguments")
            sink.end()
        except Malformed as error:
            sink.fail(error)


def _begins_header(cursor: Cursor) -> Steps[bool]:
    for literal in (_CHANNEL, _START, "to="):
        if (yield from cursor.peek(len(literal))) == literal:
            return True
    return False


def _sees_end(cursor: Cursor) -> Steps[bool]:
    for end in _ENDS:
        if (yield from cursor.sees(end)):
            return True
    return (yield from cursor.at_end()) or (yield from cursor.peek(len(_START))) == _START


def _read_body(cursor: Cursor, sink: Sink, *, is_reasoning: bool) -> Steps[None]:
    write = sink.reasoning if is_reasoning else sink.text
    end = yield from read_text(cursor, write, (*_ENDS, _START))
    if end is not None and end != _START:
        cursor.pos += len(end)
    sink.end_part()


def grammar(rules: Rules, tools: Sequence[CallTool], body: str | None, *, is_required: bool) -> str:
    """A whole output behind its analysis: a final message, or a call, which ends the turn.

    Args:
        body: what the final message has to match; None: any text.
        is_required: a call has to come.
    """
    choices: list[str] = []
    if tools:
        choices.append(any_of(rules, [_call(rules, tool) for tool in tools]))
    if not is_required:
        choices.append(f"{rules.literal(f'{_CHANNEL}final{_MESSAGE}')} {_final(rules, body)}")
    return f"({rules.literal(_START + 'assistant')})? ({' | '.join(choices)})"


def _final(rules: Rules, body: str | None) -> str:
    """The final message's text and its end."""
    if body is None and not rules.is_token(_RETURN):
        return rules.text_until(_RETURN)
    text = body or f"{rules.terminal(f'/(?s:.+)/ & {without(_CHANNEL, _START, *_ENDS)}')}?"
    return f"{text}{_closed(rules, _RETURN)}"


def _call(rules: Rules, tool: CallTool) -> str:
    head = f"{_CHANNEL}commentary to=functions.{tool.name} <|constrain|>json{_MESSAGE}"
    arguments = rules.json(tool.parameters, is_strict=tool.is_strict)
    return f"{rules.literal(head)} {arguments}{_closed(rules, '<|call|>')}"


def _closed(rules: Rules, marker: str) -> str:
    """The marker, unless it is the very token that ends the output."""
    return "" if rules.ends_output(marker) else f" {rules.literal(marker)}"
