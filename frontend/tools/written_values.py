"""Arguments of formats that are not JSON: each value becomes JSON when it is complete."""

from __future__ import annotations

from typing import Any

from frontend.tools.cursor import Malformed
from frontend.tools.json_value import write_json
from frontend.tools.sink import Sink
from frontend.tools.wide_numbers import WideNumber, read_json, read_python

_PYTHON_WORDS = {"True": True, "False": False, "None": None}


class Arguments:
    """Writes a call's arguments one by one, as pieces of one JSON object."""

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink = sink
        parameters = sink.tools.get(name, {})
        properties = parameters.get("properties")
        self._schemas: dict[str, Any] = properties if isinstance(properties, dict) else {}
        self._has_members = False
        sink.begin(name)

    def add_text(self, key: str, text: str) -> None:
        """A value without quotes, whose type only the tool's schema tells."""
        self.add(key, typed(text, self._schemas.get(key)))

    def add(self, key: str, value: object) -> None:
        member = f"{write_json(key)}: {write_json(value)}"
        before = ", " if self._has_members else "{"
        self._has_members = True
        self._sink.arguments(before + member)

    def end(self) -> None:
        self._sink.arguments("}" if self._has_members else "{}")


def typed(text: str, schema: object) -> Any:  # noqa: ANN401 - any JSON value
    """`text` as the schema's type. Without a type: JSON where it is JSON, otherwise the text itself."""
    types = types_of(schema)
    if types == {"string"}:
        return text
    value = _literal(text.strip())
    if value is _NOTHING or (types and not _is_one_of(value, types)):
        return text  # wrong for the schema; the client's own check says so better than a lost call
    return value


_NOTHING = object()


def _literal(text: str) -> Any:  # noqa: ANN401 - any JSON value
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("[", "{")):
        return _NOTHING
    try:  # some models write lists and objects as Python does
        value = read_python(text)
        write_json(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, Malformed):
        return _NOTHING
    return value


def types_of(schema: object) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return {kinds}
    if isinstance(kinds, list):
        return {kind for kind in kinds if isinstance(kind, str)}
    if isinstance(schema.get("enum"), list) and schema["enum"]:
        return {"string"} if all(isinstance(v, str) for v in schema["enum"]) else set()
    choices = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(choices, list):
        return set()
    parts = [types_of(choice) for choice in choices]
    return set().union(*parts) if all(parts) else set()


def _is_one_of(value: object, types: set[str]) -> bool:
    if value is None:
        return "null" in types
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | WideNumber):
        return bool(types & {"integer", "number"})
    if isinstance(value, float):
        return "number" in types or ("integer" in types and value.is_integer())
    if isinstance(value, str):
        return "string" in types
    return ("array" if isinstance(value, list) else "object") in types
