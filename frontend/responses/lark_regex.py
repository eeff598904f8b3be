"""A Lark grammar of a freeform tool as one regular expression, so that it can be enforced inside a JSON string.

Calls are JSON in most formats, and there the tool's text stands quoted: llguidance matches a regular expression through
the quoting, but no grammar. Grammars without recursion have one, as those of patch formats are, and so have rules that
refer to themselves only at the beginning or only at the end of an alternative: they repeat. Nesting has none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from shared.errors import InvalidRequest

MAX_CHARS = 32_768  # of the expression: rules used in several places are written out in each

# Terminals of lark's grammars/common.lark.
_COMMON = {
    "DIGIT": "[0-9]", "HEXDIGIT": "[0-9a-fA-F]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)", "LCASE_LETTER": "[a-z]", "UCASE_LETTER": "[A-Z]", "LETTER": "[a-zA-Z]",
    "FLOAT": r"(?:[0-9]+[eE][+-]?[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)",
    "NUMBER": r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "SIGNED_NUMBER": r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"', "WORD": "[a-zA-Z]+", "CNAME": "[_a-zA-Z][_a-zA-Z0-9]*",
    "WS_INLINE": r"[ \t]+", "WS": r"[ \t\f\r\n]+", "CR": r"\r", "LF": r"\n", "NEWLINE": r"(?:\r?\n)+",
}  # fmt: skip

_HEAD = re.compile(r"[?!]*(\w+)(?:\.-?\d+)?\s*:(.*)", re.DOTALL)
_IMPORT = re.compile(r"%import\s+common\s*(?:\.\s*(\w+)(?:\s*->\s*(\w+))?|\(([\w\s,]+)\))\s*")
_TOKEN = re.compile(
    r'\s+|(?P<string>"(?:\\.|[^"\\])*"i?)|(?P<regex>/(?!/)(?:\\.|[^/\\\n])+/[a-z]*)|(?P<comment>//[^\n]*)|(?P<alias>->\s*\w+)'
    r"|(?P<repeat>~\s*\d+(?:\s*\.\.\s*\d+)?)|(?P<range>\.\.)|(?P<name>\w+)|(?P<sign>[()\[\]|?*+])"
)


def regex_of(grammar: str, param: str) -> str:
    """An expression that matches exactly the texts of `grammar`, from their beginning to their end.

    Raises:
        InvalidRequest: the grammar is malformed, is recursive, or has what cannot be written so; `param` is named.
    """
    try:
        return _Translation(grammar).of("start")
    except (_NotRegular, RecursionError) as error:
        text = f"{param}: this Lark grammar cannot be enforced: {error}"
        raise InvalidRequest(text, param=param) from error


class _NotRegular(Exception):
    pass


class _Translation:
    def __init__(self, grammar: str) -> None:
        self._bodies: dict[str, str] = {}
        self._done: dict[str, str] = {}
        self._open: list[str] = []
        self._ignored: list[str] = []
        self.skip = ""  # what may follow each terminal of a rule; as in llguidance nothing is ignored at the beginning
        for statement in _statements(grammar):
            self._take(statement)
        skipped = "|".join(_Body(self, body, "%IGNORE").whole() for body in self._ignored)
        self.skip = f"(?:{skipped})*" if skipped else ""

    def _take(self, statement: str) -> None:
        if re.match(r"%ignore\s", statement):
            self._ignored.append(statement.removeprefix("%ignore"))
            return
        if statement.startswith("%"):
            found = _IMPORT.fullmatch(statement)
            if found is None:
                directive = statement.split()[0]
                what = (
                    "only 'common' can be imported from"
                    if directive == "%import"
                    else f"{directive!r} is not supported"
                )
                raise _NotRegular(what)
            name, alias, several = found.groups()
            for each in [name] if name else [part.strip() for part in several.split(",")]:
                if each not in _COMMON:
                    raise _NotRegular(f"common.{each} is not known")
                self._done[alias or each] = _COMMON[each]
            return
        head = _HEAD.fullmatch(statement)
        if head is None:
            raise _NotRegular(f"{statement[:40]!r} is no rule")
        if head[1] in self._bodies:
            raise _NotRegular(f"{head[1]!r} is defined twice")
        self._bodies[head[1]] = head[2]

    def of(self, name: str) -> str:
        """The expression of a rule or terminal, closed so that anything may stand beside it."""
        if name not in self._done:
            if name in self._open:
                raise _NotRegular(
                    f"{name!r} refers to itself within other text, and nesting cannot be matched in a call"
                )
            if name not in self._bodies:
                raise _NotRegular(f"{name!r} is not defined")
            self._open.append(name)
            self._done[name] = f"(?:{_Body(self, self._bodies[name], name).whole()})"
            self._open.pop()
        if len(self._done[name]) > MAX_CHARS:
            raise _NotRegular("written out it is too large")
        return f"(?:{self._done[name]})"


def _statements(grammar: str) -> Iterator[str]:
    """Rules and directives; a rule goes on in lines that begin with space or `|`."""
    held = ""
    for line in grammar.splitlines():
        if line.strip().startswith("//"):
            continue
        if held and (line[:1].isspace() or line.startswith("|") or not line.strip()):
            held += "\n" + line
            continue
        if held.strip():
            yield held.strip()
        held = line
    if held.strip():
        yield held.strip()


class _Body:
    """Reads what follows a rule's colon. `name` is the rule's or the terminal's."""

    def __init__(self, grammar: _Translation, text: str, name: str) -> None:
        self._grammar = grammar
        self._name = name
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None and text.startswith("%", at):
                directive = text[at:].split()[0]
                raise _NotRegular(
                    f"{directive} inside a rule: what it stands for cannot be matched in a call's quoted text"
                )
            if match is None:
                raise _NotRegular(f"{text[at : at + 20]!r} is not understood")
            if match.lastgroup not in (None, "comment", "alias"):
                self._tokens.append((match.lastgroup, match[0]))
            at = match.end()
        self._at = 0

    def whole(self) -> str:
        """A: t A | A h | b, with A nowhere else, are t's, one b and h's."""
        before, after, bases = [], [], []
        for tokens in self._top_alternatives():
            own = ("name", self._name)
            if len(tokens) > 1 and tokens[-1] == own:
                before.append(self._written(tokens[:-1]))
            elif (
                len(tokens) > 1
                and tokens[0] == own
                and tokens[1][1] not in ("?", "*", "+")
                and tokens[1][0] != "repeat"
            ):
                after.append(self._written(tokens[1:]))
            else:
                bases.append(self._written(tokens))
        if not bases:
            raise _NotRegular(f"{self._name!r} refers to itself without an end")
        loops = [f"(?:{'|'.join(parts)})*" if parts else "" for parts in (before, after)]
        base = "|".join(bases)
        return f"{loops[0]}(?:{base}){loops[1]}" if before or after else base

    def _top_alternatives(self) -> list[list[tuple[str, str]]]:
        """The tokens between the bars that stand in no group."""
        found: list[list[tuple[str, str]]] = [[]]
        depth = 0
        for token in self._tokens:
            depth += (token in (("sign", "("), ("sign", "["))) - (token in (("sign", ")"), ("sign", "]")))
            if depth == 0 and token == ("sign", "|"):
                found.append([])
            else:
                found[-1].append(token)
        return found

    def _written(self, tokens: list[tuple[str, str]]) -> str:
        self._tokens, self._at = tokens, 0
        written = self._alternatives()
        if self._at < len(tokens):
            raise _NotRegular(f"{tokens[self._at][1]!r} stands in a wrong place")
        return written

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("", "")

    def _alternatives(self) -> str:
        parts = [self._sequence()]
        while self._peek() == ("sign", "|"):
            self._at += 1
            parts.append(self._sequence())
        return "|".join(parts)

    def _sequence(self) -> str:
        written = ""
        while self._peek()[0] and self._peek() not in (("sign", "|"), ("sign", ")"), ("sign", "]")):
            written += self._repeated()
            if len(written) > MAX_CHARS:
                raise _NotRegular("written out it is too large")
        return written

    def _repeated(self) -> str:
        atom = self._atom()
        kind, text = self._peek()
        if kind == "sign" and text in "?*+":
            self._at += 1
            return f"(?:{atom}){text}"
        if kind == "repeat":
            self._at += 1
            return f"(?:{atom}){{{','.join(re.findall(r'[0-9]+', text))}}}"
        return atom

    def _atom(self) -> str:
        """With what is ignored after it, if it is a terminal within a rule."""
        kind, text = self._peek()
        is_terminal = kind in ("string", "regex") or (kind == "name" and _is_terminal(text))
        skip = self._grammar.skip if is_terminal and not _is_terminal(self._name) else ""
        return self._bare_atom() + skip

    def _bare_atom(self) -> str:
        kind, text = self._peek()
        self._at += 1
        match kind:
            case "string":
                if self._peek()[0] == "range":
                    self._at += 1
                    end_kind, end = self._peek()
                    self._at += 1
                    if end_kind != "string" or len(_unquoted(text)) != 1 or len(_unquoted(end)) != 1:
                        raise _NotRegular("a range needs two characters")
                    return f"[{_escaped(_unquoted(text))}-{_escaped(_unquoted(end))}]"
                written = _escaped(_unquoted(text))
                return f"(?i:{written})" if text.endswith("i") else written
            case "regex":
                body, _, flags = text[1:].rpartition("/")
                odd = set(flags) - set("imslu")
                if odd:
                    raise _NotRegular(f"the flag {min(odd)!r} of a regular expression")
                kept = "".join(sorted(set(flags) & set("ims")))
                return f"(?{kept}:{body})".replace(r"\/", "/")
            case "name":
                return self._grammar.of(text)
            case "sign" if text in "([":
                inside = self._alternatives()
                if self._peek() != ("sign", ")" if text == "(" else "]"):
                    raise _NotRegular(f"{text!r} is not closed")
                self._at += 1
                return f"(?:{inside})" + ("?" if text == "[" else "")
        raise _NotRegular(f"{text or 'the end'!r} stands in a wrong place")


def _is_terminal(name: str) -> bool:
    return name.lstrip("_%")[:1].isupper()


def _unquoted(text: str) -> str:
    try:
        unquoted: str = json.loads(text.removesuffix("i"))
    except ValueError as error:
        raise _NotRegular(f"the string {text[:20]} cannot be read") from error
    return unquoted


def _escaped(text: str) -> str:
    """Literally, with anchors' signs by their numbers: nothing that looks for anchors takes them for some."""
    return "".join(f"\\x{ord(c):02x}" if c in "^$" else re.escape(c) for c in text)
