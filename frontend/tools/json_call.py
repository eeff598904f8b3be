"""A call as a JSON object with a name and arguments, in whatever order its members come."""

from __future__ import annotations

from frontend.tools.cursor import Cursor, Malformed, Steps
from frontend.tools.json_value import copy_value, read_value, write_json
from frontend.tools.sink import Sink
from frontend.tools.wide_numbers import read_json

ARGUMENT_KEYS = ("arguments", "parameters")
_KEYS = (*ARGUMENT_KEYS, "name", "type", "id")


def read_json_call(cursor: Cursor, sink: Sink, *, known_only: bool = False) -> Steps[None]:
    """Begin a call and pass its arguments on; the caller ends it.

    Args:
        known_only: an object that names none of the request's tools is no call.

    Raises:
        Malformed: no such object.
    """
    yield from cursor.skip_space()
    yield from cursor.expect("{")
    name: str | None = None
    early: str | None = None  # arguments that came before the name
    has_arguments = False
    is_first = True
    while True:
        yield from cursor.skip_space()
        if (yield from cursor.sees("}")):
            break
        if not is_first:
            yield from cursor.expect(",")
        is_first = False
        key = yield from read_value(cursor)
        if known_only and key not in _KEYS:
            raise Malformed("not a call's key", is_call=False)
        yield from cursor.skip_space()
        yield from cursor.expect(":")
        yield from cursor.skip_space()
        if key == "name" and name is None:
            name = yield from read_value(cursor)
            if not isinstance(name, str) or not name or (known_only and name not in sink.tools):
                raise Malformed("no tool's name", is_call=not known_only)
            if early is not None:
                sink.begin(name)
                sink.arguments(early)
        elif key in ARGUMENT_KEYS and not has_arguments:
            has_arguments = True
            if name is not None and (yield from cursor.peek()) == "{":
                sink.begin(name)
                yield from copy_value(cursor, sink.arguments)
                continue
            early = _as_object((yield from read_value(cursor)))
            if name is not None:
                sink.begin(name)
                sink.arguments(early)
        else:
            yield from read_value(cursor)  # an id, a type: of no use here
    if name is None:
        raise Malformed("a call without a name", is_call=not known_only)
    if not has_arguments:
        sink.begin(name)
        sink.arguments("{}")


def _as_object(value: object) -> str:
    """The JSON text of arguments that were written as null or as a string of JSON."""
    if isinstance(value, str):
        try:
            value = read_json(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise Malformed("the arguments are a string that is not JSON") from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise Malformed("the arguments are not an object")
    return write_json(value)


def read_arguments(cursor: Cursor, sink: Sink) -> Steps[None]:
    """The arguments of a call that has begun: one JSON object."""
    yield from cursor.skip_space()
    if (yield from cursor.peek()) != "{":
        raise Malformed("the arguments are not an object")
    yield from copy_value(cursor, sink.arguments)
