"""Grammars of tool calls: Lark rules that each format writes in its own syntax, from the tools' schemas.

A tool that is not strict is only promised a call of the right form: keywords of its schema that cannot be expressed are
left out. A strict one is promised exactly its schema, or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from shared.grammar import Compiler, json_schema

if TYPE_CHECKING:
    from frontend.tools.format import ToolFormat

# Python's and JSON's strings agree on these; \u would need surrogate pairs, which Python reads as two characters.
PYTHON_ESCAPES = 'nrbtf\\"'

NEWLINE = "\n"  # Python 3.11 takes no backslash inside an f-string's braces


class NotExpressible(Exception):
    """A schema asks for what the format's syntax cannot say; `frontend.grammar` makes a 400 of it."""

    def __init__(self, reason: str, param: str) -> None:
        super().__init__(reason)
        self.param = param


class CallTool(Struct, frozen=True, kw_only=True):
    name: str
    parameters: dict[str, Any]
    is_strict: bool
    param: str  # where the request has the schema

    def refuse(self, reason: str) -> NotExpressible:
        return NotExpressible(reason, self.param)


class CallSyntax(Struct, frozen=True):
    """Lark expressions of one or several calls. `rest` is what follows `trigger`, the marker that begins them.

    `bare` is for models that may leave the marker out at the very beginning of their output: all of the calls then.
    """

    trigger: str
    rest: str
    forced: str
    bare: str | None = None


class Rules:
    """Rules and terminals under construction.

    Args:
        markers: texts that are special tokens in some vocabularies: there the grammar has to name the token.
    """

    def __init__(self, compiler: Compiler, markers: Sequence[str]) -> None:
        self._special: dict[str, int] = {}
        for marker in markers:
            token_id = compiler.token_id(marker)
            if token_id is not None and compiler.is_special(token_id):
                self._special[marker] = token_id
        self._eos = frozenset(compiler.eos_token_ids)
        self._named: dict[str, str] = {}  # body -> name
        self._lines: list[str] = []
        split = "|".join(re.escape(m) for m in sorted(self._special, key=len, reverse=True))
        self._split = re.compile(f"({split})") if split else None

    def source(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._lines]) + "\n"

    def add(self, body: str) -> str:
        """A rule's name; equal bodies share one."""
        return self._name("r", body)

    def terminal(self, body: str) -> str:
        return self._name("T", body)

    def lazy(self, regex: str) -> str:
        """Text up to and with the first match of `regex`'s end."""
        body = f"/{regex}/"
        if body not in self._named:
            self._named[body] = f"lazy_{len(self._named)}"
            self._lines.append(f"{self._named[body]}[lazy]: {body}")
        return self._named[body]

    def declare(self) -> str:
        """A name whose body `define` brings later: for what refers to itself."""
        name = f"d_{len(self._named)}"
        self._named[name] = name
        return name

    def define(self, name: str, body: str) -> None:
        self._lines.append(f"{name}: {body}")

    def _name(self, prefix: str, body: str) -> str:
        name = self._named.get(body)
        if name is None:
            name = self._named[body] = f"{prefix}_{len(self._named)}"
            self._lines.append(f"{name}: {body}")
        return name

    # ------------------------------------------------ pieces

    def is_token(self, marker: str) -> bool:
        """Whether the model writes this marker as a special token."""
        return marker in self._special

    def ends_output(self, marker: str) -> bool:
        """Whether the marker is a token that ends the output anyway: a grammar must not ask for it."""
        return self._special.get(marker) in self._eos

    def literal(self, text: str) -> str:
        """`text` as it is, special tokens by their ids."""
        parts = self._split.split(text) if self._split is not None else [text]
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )

    def json(self, schema: dict[str, Any], *, is_strict: bool, escapes: str | None = None) -> str:
        """A JSON value of this schema."""
        whole = json_schema(schema, is_lenient=not is_strict, escapes=escapes)
        return self.add("%json " + json.dumps(whole))

    def text_until(self, end: str, base: str = "") -> str:
        """Text that does not hold `end`, and `end` itself.

        Args:
            base: a terminal's expression that the text has to match too.
        """
        if not base and not self.is_token(end):
            return self.lazy(f"(?s:.*){escape(end)}")
        inside = f"({base or '/(?s:.*)/'} & {without(end)})"
        if self.is_token(end):
            text = self.terminal(inside)
            return f"{text} {self.literal(end)}" if base else f"{text}? {self.literal(end)}"
        return self.terminal(f"{inside} {json.dumps(end, ensure_ascii=False)}")


def escape(text: str) -> str:
    """`text` within a Lark regular expression."""
    return re.escape(text).replace("/", r"\/").replace("\n", r"\n")


def without(*texts: str) -> str:
    """A terminal's expression for text that holds none of `texts`."""
    return f"~/(?s:.*)({'|'.join(escape(text) for text in texts)})(?s:.*)/"


def one_or_more(rules: Rules, call: str, between: str, is_single: bool) -> str:
    return call if is_single else f"{call} ({between} {call})*".replace("( ", "(")


def any_of(rules: Rules, parts: Sequence[str]) -> str:
    return rules.add(" | ".join(parts))


def json_call(rules: Rules, tool: CallTool, key: str = "arguments") -> str:
    """{"name": ..., "arguments": {...}}."""
    head = json.dumps({"name": tool.name}, ensure_ascii=False)[:-1] + f', "{key}": '
    return f"{rules.literal(head)} {rules.json(tool.parameters, is_strict=tool.is_strict)} {rules.literal('}')}"


def each(rules: Rules, tools: Sequence[CallTool], write: Callable[[CallTool], str]) -> str:
    """One call of any of the tools."""
    return any_of(rules, [write(tool) for tool in tools])


def free_text_then_calls(rules: Rules, syntax: CallSyntax, form: ToolFormat) -> str:
    """Any text, which holds no marker of a call, and then the calls or nothing."""
    markers = (*form.starts, *form.frames)
    body = f"/(?s:.+)/ & {without(*markers)}"
    if syntax.bare is not None:  # a brace at the beginning would be read as a call
        body += r" & ~/[ \t\r\n]*\{(?s:.*)/"
    text = rules.terminal(body)
    if rules.is_token(syntax.trigger):
        start = f"({text})? ({rules.literal(syntax.trigger)} {syntax.rest})?"
    else:
        # As long as a lexeme can go on the parser does not look at others, so this one must not begin like a bare call.
        before = "(?s:.*)" if syntax.bare is None else r"[ \t\r\n]*([^{ \t\r\n](?s:.*))?"
        start = f"({text})? | {rules.lazy(f'{before}{escape(syntax.trigger)}')} {syntax.rest}"
    return start if syntax.bare is None else f"{start} | {syntax.bare}"
