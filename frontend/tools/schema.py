"""Tools' parameter schemas, taken apart for formats that write parameters one by one."""

from __future__ import annotations

import json
import re
from typing import Any

from msgspec import Struct

from frontend.tools.calls import CallTool, Rules, escape

# What says nothing about which values are valid.
ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema", "$id"}
)
_OF_OBJECTS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}


class Parameter(Struct, frozen=True):
    name: str
    schema: dict[str, Any]
    is_required: bool


def parameters(tool: CallTool) -> list[Parameter]:
    """A tool's parameters in the order of its schema.

    Raises:
        NotExpressible: the tool is strict and its schema says more than a list of parameters can.
    """
    schema = resolve(tool, tool.parameters)
    if tool.is_strict:
        odd = sorted(set(schema) - _OF_OBJECTS)
        if odd:
            raise tool.refuse(f"{odd[0]!r} cannot be enforced in this model's way of writing calls")
    properties = schema.get("properties")
    known = dict(properties) if isinstance(properties, dict) else {}
    required = [name for name in schema.get("required") or [] if isinstance(name, str)]
    for name in required:
        known.setdefault(name, {})
    return [Parameter(name, as_schema(part), name in required) for name, part in known.items()]


def as_schema(schema: object) -> dict[str, Any]:
    if schema is False:
        return {"not": {}}
    return schema if isinstance(schema, dict) else {}


def resolve(tool: CallTool, schema: dict[str, Any]) -> dict[str, Any]:
    """`schema`, or what its `$ref` within the tool's schema names.

    Raises:
        NotExpressible: the reference leads nowhere.
    """
    seen: set[str] = set()
    while isinstance(ref := schema.get("$ref"), str):
        if ref in seen:
            raise tool.refuse(f"$ref {ref!r} refers to itself")
        seen.add(ref)
        target: Any = tool.parameters
        for part in ref.removeprefix("#").split("/")[1:]:
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        if not ref.startswith("#") or not isinstance(target, dict):
            raise tool.refuse(f"$ref {ref!r} is not in the schema")
        schema = target
    return schema


def standing_alone(tool: CallTool, schema: dict[str, Any]) -> dict[str, Any]:
    """A part of the tool's schema with the definitions that it may refer to."""
    definitions: dict[str, Any] = {
        key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters
    }
    return {**definitions, **schema}


def strings_of(tool: CallTool, schema: dict[str, Any]) -> list[str] | None:
    """The strings that an enum or const allows; None without one."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return None
    strings = [value for value in values if isinstance(value, str)]
    if not strings:
        raise tool.refuse("an enum of strings without a string")
    return strings


def text_terminal(tool: CallTool, schema: dict[str, Any]) -> str:
    """What a string's length and pattern ask for, as a terminal's expression; empty: nothing.

    Raises:
        NotExpressible: the tool is strict and a keyword cannot be kept.
    """
    parts: list[str] = []
    odd = sorted(set(schema) - ANNOTATIONS - {"type", "enum", "const", "minLength", "maxLength", "pattern"})
    if odd and tool.is_strict:
        raise tool.refuse(f"{odd[0]!r} of a string cannot be enforced in this model's way of writing calls")
    least, most = schema.get("minLength"), schema.get("maxLength")
    if least is not None or most is not None:
        parts.append(f"/(?s:.{{{least or 0},{'' if most is None else most}}})/")
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        searched = _searched(pattern)
        if searched is not None:
            parts.append(searched)
        elif tool.is_strict:
            raise tool.refuse(f"pattern {pattern!r} cannot be enforced in this model's way of writing calls")
    return " & ".join(parts)


def _searched(pattern: str) -> str | None:
    """The pattern as one that has to match the whole text; None where it cannot be told."""
    is_from_start, is_to_end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[is_from_start : len(pattern) - is_to_end]
    if (is_from_start or is_to_end) and "|" in inner and not _is_group(inner):
        return None  # the anchor may belong to one alternative only
    if any(sign in _signs(inner) for sign in ("^", "$")):
        return None
    inner = inner.replace(r"\/", "/").replace("/", r"\/")
    before, after = "" if is_from_start else "(?s:.*)", "" if is_to_end else "(?s:.*)"
    return f"/{before}({inner}){after}/"


def _signs(pattern: str) -> str:
    """The pattern without escaped characters and classes, where signs mean themselves."""
    return re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "", pattern)


def _is_group(pattern: str) -> bool:
    """Whether one pair of parentheses holds all of it."""
    if not pattern.startswith("(?:") or not pattern.endswith(")"):
        return False
    depth = 0
    bare = _signs(pattern)
    for i, char in enumerate(bare):
        depth += (char == "(") - (char == ")")
        if depth == 0 and i < len(bare) - 1:
            return False
    return bare.endswith(")") and depth == 0


def json_constant(rules: Rules, value: object) -> str:
    return rules.literal(json.dumps(value, ensure_ascii=False))


def alternatives(rules: Rules, texts: list[str]) -> str:
    """One of these texts, as one terminal: the longer of two that begin alike may be meant."""
    return rules.terminal("/" + "|".join(escape(text) for text in texts) + "/")
