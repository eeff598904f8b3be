"""Gemma 4's arguments as Lark rules: like JSON, with bare keys and a marker for a quote."""

from __future__ import annotations

import re
from typing import Any

from frontend.tools.calls import CallTool, Rules
from frontend.tools.schema import ANNOTATIONS, as_schema, parameters, resolve, text_terminal
from frontend.tools.sequence import separated

_KEY = re.compile(r"[A-Za-z_][\w-]*")
_SCALARS = ("integer", "number", "boolean", "null")
_KNOWN = ANNOTATIONS | {"type", "enum", "const", "anyOf", "oneOf", "$ref", "$defs", "definitions"}
_OF_ARRAYS = _KNOWN | {"items", "minItems", "maxItems"}
_OF_OBJECTS = _KNOWN | {"properties", "required", "additionalProperties"}
_MAX_ITEMS = 1 << 16


def arguments(rules: Rules, tool: CallTool, quote: str) -> str:
    """The braces and all between them. Raises NotExpressible."""
    writer = _Writer(rules, tool, quote)
    members = [(p.name, p.schema, p.is_required) for p in parameters(tool)]
    return writer.members(members)


class _Writer:
    def __init__(self, rules: Rules, tool: CallTool, quote: str) -> None:
        self._rules = rules
        self._tool = tool
        self._quote = quote
        self._references: dict[str, str] = {}
        self._any: str | None = None

    def members(self, members: list[tuple[str, dict[str, Any], bool]]) -> str:
        parts = []
        for name, schema, is_required in members:
            if not _KEY.fullmatch(name):
                raise self._tool.refuse(f"a key {name!r} cannot be written in this model's calls")
            parts.append((f"{self._rules.literal(name + ':')} {self.value(schema)}", is_required))
        return f"{self._rules.literal('{')} {separated(self._rules, parts, ',')} {self._rules.literal('}')}"

    def value(self, schema: dict[str, Any]) -> str:
        """An expression for the values of a schema."""
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return self._referred(reference, schema)
        if "const" in schema or isinstance(schema.get("enum"), list):
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._rules.add(" | ".join(self._constant(value) for value in values))
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list):
                self._check(schema, _KNOWN)
                return self._rules.add(" | ".join(self.value(as_schema(part)) for part in schema[key]))
        types = schema.get("type")
        if types is None:
            if self._tool.is_strict and set(schema) - ANNOTATIONS:
                key = sorted(set(schema) - ANNOTATIONS)[0]
                raise self._tool.refuse(
                    f"{key!r} without a type cannot be enforced in this model's way of writing calls"
                )
            return self._anything()
        kinds = types if isinstance(types, list) else [types]
        return self._rules.add(" | ".join(self._of_type(str(kind), schema) for kind in kinds))

    def _of_type(self, kind: str, schema: dict[str, Any]) -> str:
        if kind == "string":
            return self._string(text_terminal(self._tool, schema))
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        if kind in _SCALARS:
            return self._rules.json({**schema, "type": kind}, is_strict=self._tool.is_strict)
        raise self._tool.refuse(f"type {kind!r} is not known")

    def _string(self, base: str) -> str:
        return f"{self._rules.literal(self._quote)} {self._rules.text_until(self._quote, base)}"

    def _array(self, schema: dict[str, Any]) -> str:
        self._check(schema, _OF_ARRAYS)
        item = self.value(as_schema(schema.get("items")))
        least = int(schema.get("minItems") or 0)
        most = schema.get("maxItems")
        more = f"({self._rules.literal(',')} {item}){{{max(0, least - 1)},{'' if most is None else max(0, most - 1)}}}"
        items = "" if most == 0 else f"({item} {more})" + ("" if least else "?")
        return self._rules.add(f"{self._rules.literal('[')} {items} {self._rules.literal(']')}")

    def _object(self, schema: dict[str, Any]) -> str:
        self._check(schema, _OF_OBJECTS)
        properties = schema.get("properties")
        if isinstance(properties, dict) and properties:
            required = schema.get("required") or []
            return self._rules.add(self.members([(k, as_schema(v), k in required) for k, v in properties.items()]))
        others = schema.get("additionalProperties", True)
        if others is False:
            return self._rules.literal("{}")
        return self._map(self._anything() if others is True else self.value(as_schema(others)))

    def _map(self, value: str) -> str:
        member = self._rules.add(f'/[A-Za-z_][A-Za-z0-9_]{{0,63}}/ ":" {value}')
        return self._rules.add(f'"{{" ({member} ("," {member})*)? "}}"')

    def _anything(self) -> str:
        """Any value at all."""
        if self._any is None:
            name = self._any = self._rules.declare()
            scalar = self._rules.json({"type": list(_SCALARS)}, is_strict=True)
            array = f'"[" ({name} ("," {name})*)? "]"'
            self._rules.define(name, f"{self._string('')} | {scalar} | {array} | {self._map(name)}")
        return self._any

    def _referred(self, reference: str, schema: dict[str, Any]) -> str:
        self._check(schema, _KNOWN)
        if reference not in self._references:
            name = self._references[reference] = self._rules.declare()
            self._rules.define(name, self.value(resolve(self._tool, {"$ref": reference})))
        return self._references[reference]

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            if self._quote in value:
                raise self._tool.refuse(f"the string {value!r} holds the marker for a quote")
            return self._rules.literal(f"{self._quote}{value}{self._quote}")
        if isinstance(value, list | dict):
            raise self._tool.refuse("an enum of lists or objects cannot be written in this model's calls")
        return self._rules.json({"const": value}, is_strict=True)

    def _check(self, schema: dict[str, Any], known: frozenset[str]) -> None:
        odd = sorted(set(schema) - known)
        if odd and self._tool.is_strict:
            raise self._tool.refuse(f"{odd[0]!r} cannot be enforced in this model's way of writing calls")
