"""Values that a model wrote as JSON or as Python, with numbers of any size.

JSON has no largest number, Python's reader has: `1e999` becomes infinite and 5,000 digits are refused. Such a number is
kept as it is written, so that a call is not lost for it; whether it makes sense is for the tool to say.
"""

from __future__ import annotations

import ast
import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
# Python's strings, so that numbers in them are left alone, and its numbers.
_PARTS = re.compile(
    r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|(?<![\w.])[-+]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?(?![\w.])",
    re.DOTALL,
)
_JSON_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class WideNumber:
    """A JSON number, as it is written."""

    text: str

    def __str__(self) -> str:
        return self.text


def has_wide_number(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(has_wide_number, (*value, *value.values())))
    return isinstance(value, WideNumber) or (isinstance(value, list | tuple) and any(map(has_wide_number, value)))


def read_json(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Any JSON value. Raises ValueError or RecursionError where it is none."""
    return json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_refuse)


def read_python(text: str) -> Any:  # noqa: ANN401 - any literal
    """A Python literal, in which JSON's words for True, False and None may stand.

    Raises:
        ValueError, TypeError, SyntaxError, MemoryError, RecursionError: it is none.
    """
    wide: dict[str, WideNumber] = {}

    def name(match: re.Match[str]) -> str:
        if match.group()[0] in "'\"":
            return match.group()
        written = match.group().replace("_", "").removeprefix("+")
        number = _real(written) if re.search("[.eE]", written) else _whole(written)
        if not isinstance(number, WideNumber):
            return match.group()
        wide[f"_wide_{len(wide)}"] = number
        return f"_wide_{len(wide) - 1}"

    words = _Words(wide)
    tree = words.visit(ast.parse(_PARTS.sub(name, text), mode="eval"))
    if words.num_wide != len(wide):
        raise ValueError("one of the numbers stands inside a string")
    return ast.literal_eval(tree)


class _Words(ast.NodeTransformer):
    """Names become what they stand for."""

    def __init__(self, wide: dict[str, WideNumber]) -> None:
        self._wide = wide
        self.num_wide = 0

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self._wide:
            self.num_wide += 1
            return ast.Constant(self._wide[node.id])  # type: ignore[arg-type]  # literal_eval takes any constant
        return ast.Constant(_JSON_WORDS[node.id]) if node.id in _JSON_WORDS else node


def _whole(digits: str) -> int | WideNumber:
    try:
        return int(digits)
    except ValueError:  # more digits than Python reads
        return _wide(digits)


def _real(text: str) -> float | WideNumber:
    number = float(text)
    return number if math.isfinite(number) else _wide(text)


def _wide(text: str) -> WideNumber:
    if not _NUMBER.fullmatch(text):
        raise ValueError("not a JSON number")
    return WideNumber(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
