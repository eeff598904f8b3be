"""JSON that is copied while it arrives, checked character by character, so that what was copied is never invalid."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.wide_numbers import WideNumber, read_json

MAX_DEPTH = 64

Write = Callable[[str], None]

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_WORD = re.compile(r"[-+.0-9A-Za-z]*")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9A-Fa-f]{4})')


def copy_value(cursor: Cursor, write: Write, depth: int = 0) -> Steps[None]:
    """Hand one JSON value to `write` as it arrives, without the space between tokens.

    Control characters inside strings, which models do write, are escaped on the way.

    Raises:
        Malformed: it is no JSON, or nested deeper than MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise Malformed("the JSON is nested too deeply")
    yield from cursor.skip_space()
    first = yield from cursor.peek()
    if first == "{":
        yield from _copy_members(cursor, write, "}", depth)
    elif first == "[":
        yield from _copy_members(cursor, write, "]", depth)
    elif first == '"':
        yield from _copy_string(cursor, write)
    else:
        yield from _copy_scalar(cursor, write)


def read_value(cursor: Cursor) -> Steps[Any]:
    """One whole JSON value, decoded."""
    parts: list[str] = []
    yield from copy_value(cursor, parts.append)
    return read_json("".join(parts))


def write_json(value: object) -> str:
    """The JSON text of a value. Raises Malformed for one that JSON does not have."""
    try:
        text = _text(value, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return _text(value, ensure_ascii=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise Malformed("a value that JSON does not have") from error
    return text


def _text(value: object, *, ensure_ascii: bool) -> str:
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except TypeError:  # there may be a wide number in it, for which json has no hook
        match value:
            case WideNumber(text):
                return text
            case dict():
                members = [
                    f"{_key(key, ensure_ascii=ensure_ascii)}: {_text(inner, ensure_ascii=ensure_ascii)}"
                    for key, inner in value.items()
                ]
                return "{" + ", ".join(members) + "}"
            case list() | tuple():
                return "[" + ", ".join(_text(inner, ensure_ascii=ensure_ascii) for inner in value) + "]"
            case _:
                raise


def _key(key: object, *, ensure_ascii: bool) -> str:
    """As json writes it: any scalar becomes a string."""
    if isinstance(key, WideNumber):
        return f'"{key.text}"'
    return json.dumps({key: 0}, ensure_ascii=ensure_ascii)[1:-4]


def _copy_members(cursor: Cursor, write: Write, end: str, depth: int) -> Steps[None]:
    write(cursor.text[cursor.pos])
    cursor.pos += 1
    yield from cursor.skip_space()
    if (yield from cursor.sees(end)):
        return write(end)
    while True:
        if end == "}":
            yield from cursor.skip_space()
            yield from _copy_string(cursor, write)
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            write(": ")
        yield from copy_value(cursor, write, depth + 1)
        yield from cursor.skip_space()
        if (yield from cursor.sees(end)):
            return write(end)
        yield from cursor.expect(",")
        write(", ")


def _copy_string(cursor: Cursor, write: Write) -> Steps[None]:
    yield from cursor.expect('"')
    write('"')
    while True:
        run = _PLAIN.match(cursor.text, cursor.pos)
        assert run is not None, "it matches nothing too"
        if run.group():
            write(run.group())
            cursor.pos = run.end()
        char = yield from cursor.peek()
        if char == '"':
            cursor.pos += 1
            return write('"')
        if char == "\\":
            escape = yield from cursor.peek(2)
            if escape == "\\u":
                escape = yield from cursor.peek(6)
            if not _ESCAPE.fullmatch(escape):
                raise Malformed("a bad escape in a string")
            write(escape)
            cursor.pos += len(escape)
        elif char and char < " ":
            write(json.dumps(char)[1:-1])
            cursor.pos += 1
        elif not char:
            raise Malformed("a string without an end")


def _copy_scalar(cursor: Cursor, write: Write) -> Steps[None]:
    start = cursor.pos
    while True:
        run = _WORD.match(cursor.text, start)
        assert run is not None, "it matches nothing too"
        if run.end() < len(cursor.text) or cursor.is_closed:
            break
        yield
    if not _SCALAR.fullmatch(run.group()):
        raise Malformed("not a JSON value")
    cursor.pos = run.end()
    write(run.group())
