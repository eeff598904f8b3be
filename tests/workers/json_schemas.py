"""JSON schemas as clients send them, grouped by what they try. Lengths are bounded, so that every output ends."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "maxLength": 6}


def obj(*optional: str, closed: bool = True, **properties: Any) -> Schema:
    """An object with these properties, all required but for `optional`."""
    schema: Schema = {"type": "object", "properties": properties}
    required = [name for name in properties if name not in optional]
    if required:
        schema["required"] = required
    return schema | {"additionalProperties": False} if closed else schema


def arr(items: Any, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": most, **more}


SCALARS: list[Schema] = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    TEXT,
    {"type": ["integer", "null"]},
    {"type": ["boolean", "null"]},
    {"type": ["integer", "boolean", "null"]},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": ["number", "string"], "maxLength": 3},
    {"const": 1},
    {"const": "fixed"},
    {"const": None},
    {"const": True},
    {"const": [1, "a", {"b": 2}]},
    {"const": {"a": {"b": []}}},
    {"const": -1.5},
    {"const": 'a"b\\c\n'},
    {"const": "héllo 世界 🎈"},
    {"enum": [1, 2, 3]},
    {"enum": ["a", "ab", "abc"]},
    {"enum": [None, True, "x", 0]},
    {"enum": [[1], {"a": 1}, "z"]},
    {"type": "string", "enum": ["red", "green", "blue"]},
    {"type": "integer", "enum": [10, 100, 1000]},
    {"enum": ["", " ", "\t"]},
    {"enum": ["ünï", "日本", "🙂"]},
]

NUMBERS: list[Schema] = [
    {"type": "integer", "minimum": 0, "maximum": 9},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "minimum": 17, "maximum": 1234},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": 3},
    {"type": "integer", "minimum": -100, "exclusiveMaximum": -90},
    {"type": "integer", "minimum": 1000000},
    {"type": "integer", "maximum": -7},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
    {"type": "integer", "multipleOf": 3},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    {"type": "number", "minimum": -1.5, "maximum": 2.25},
    {"type": "number", "minimum": 0},
    {"type": "number", "maximum": 0},
    {"type": "number", "minimum": 99.5},
    {"type": "number", "multipleOf": 1},
    {"type": "integer", "minimum": 7, "maximum": 7},
    {"type": "number", "minimum": 1e3, "maximum": 1e4},
    {"type": "integer", "minimum": 2, "maximum": 65535},
]

STRINGS: list[Schema] = [
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "minLength": 1, "maxLength": 10},
    {"type": "string", "maxLength": 0},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "pattern": "^[A-Z][a-z]{0,4}$"},
    {"type": "string", "pattern": "^(yes|no)$"},
    {"type": "string", "pattern": "^[0-9]{3}-[0-9]{4}$"},
    {"type": "string", "pattern": "^\\d{1,3}(\\.\\d{1,3}){3}$"},
    {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"},
    {"type": "string", "pattern": "^[^x]{1,4}$"},
    {"type": "string", "pattern": "^a?b*c{1,2}$", "maxLength": 8},
    {"type": "string", "pattern": "^(ab|cd)+$", "maxLength": 6},
    {"type": "string", "pattern": "^\\w{1,6}$"},
    {"type": "string", "pattern": '^["\\\\]{1,3}$'},
    {"type": "string", "pattern": "^v[0-9]+\\.[0-9]+$", "maxLength": 8},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "duration"},
]

ARRAYS: list[Schema] = [
    arr({"type": "integer"}),
    arr(TEXT),
    arr({"type": "boolean"}, 5),
    arr({"enum": ["a", "b"]}, 4, minItems=2),
    arr({"type": "null"}, 2, minItems=2),
    arr(arr({"type": "integer", "maximum": 9, "minimum": 0}, 2), 2),
    arr(obj(x={"type": "integer"}), 2, minItems=1),
    arr({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 3),
    {"type": "array", "prefixItems": [{"type": "integer"}, TEXT], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [{"const": "a"}], "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "maxItems": 0},
    arr({"const": 0}, 1),
    arr({"type": ["integer", "null"]}, 4, minItems=1),
    arr({"type": "number", "minimum": 0, "maximum": 1}, 3, minItems=3),
    arr(arr(arr({"type": "boolean"}, 1), 1), 1),
]

OBJECTS: list[Schema] = [
    obj(a={"type": "integer"}),
    obj(a=TEXT, b={"type": "boolean"}),
    obj("b", a=TEXT, b={"type": "integer"}),
    obj("a", "b", a={"type": "null"}, b={"type": "boolean"}),
    obj("a", a={"type": "integer"}),
    obj(),
    obj(
        name=TEXT,
        age={"type": "integer", "minimum": 0, "maximum": 150},
        email={"type": ["string", "null"], "maxLength": 5},
    ),
    obj(a=obj(b=obj(c=obj(d={"type": "integer"})))),
    obj(tags=arr(TEXT), meta=obj("n", n={"type": "number"})),
    obj(first={"const": 1}, second={"const": 2}, third={"const": 3}),
    obj(**{"with space": TEXT, "ünï": TEXT, 'a"b': TEXT}),
    obj(**{f"p{i}": {"type": "boolean"} for i in range(12)}),
    obj(*[f"p{i}" for i in range(8)], **{f"p{i}": {"const": i} for i in range(8)}),
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 2},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 3},
    {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": {"const": 1},
        "maxProperties": 1,
    },
    obj(kind={"const": "circle"}, radius={"type": "number", "exclusiveMinimum": 0, "maximum": 10}),
    obj(a={"type": "array", "items": obj(k=TEXT, v={"type": "integer"}), "maxItems": 2}),
    obj("z", z=obj("y", y={"type": "integer"})),
    obj(point=arr({"type": "number", "minimum": -1, "maximum": 1}, 2, minItems=2), label={"enum": ["a", "b", None]}),
    {
        "type": "object",
        "properties": {},
        "required": ["b"],
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 1,
    },
    {
        "type": ["object", "null"],
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    },
]

COMBINED: list[Schema] = [
    {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    {"anyOf": [TEXT, {"type": "null"}]},
    {"anyOf": [obj(a={"type": "integer"}), obj(b={"type": "boolean"})]},
    {"anyOf": [arr({"type": "integer"}), {"const": "none"}]},
    {"anyOf": [{"const": "a"}, {"const": "ab"}, {"enum": ["abc", 1]}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"type": "null"}, {"type": "boolean"}]},
    {"oneOf": [obj(kind={"const": "a"}, x={"type": "integer"}), obj(kind={"const": "b"}, y={"type": "boolean"})]},
    {"oneOf": [{"type": "integer"}, {"const": "n"}]},
    {"oneOf": [arr({"type": "null"}, 1), {"type": "object", "maxProperties": 0}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"allOf": [TEXT, {"minLength": 2}]},
    {
        "allOf": [
            obj(a={"type": "integer"}, closed=False),
            {"properties": {"a": {"minimum": 5, "maximum": 9}}, "additionalProperties": False},
        ]
    },
    {"type": "integer", "anyOf": [{"maximum": 2, "minimum": 0}, {"minimum": 10, "maximum": 12}]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    {"anyOf": [{"allOf": [{"const": 1}]}, {"type": "null"}]},
    obj(v={"anyOf": [obj(s=TEXT), obj(n={"type": "integer"}), {"type": "null"}]}),
    obj(v={"oneOf": [{"type": "boolean"}, arr({"const": 1}, 2)]}),
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}],
        "additionalProperties": False,
    },
]

NODE = obj("next", value={"type": "integer", "minimum": 0, "maximum": 99}, next={"$ref": "#/$defs/node"})
TREE = obj(name=TEXT, children=arr({"$ref": "#/$defs/tree"}, 1))
REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}},
    {"$ref": "#/definitions/n", "definitions": {"n": {"type": "boolean"}}},
    obj(a={"$ref": "#/$defs/t"}, b={"$ref": "#/$defs/t"}) | {"$defs": {"t": TEXT}},
    arr({"$ref": "#/$defs/p"}, 2) | {"$defs": {"p": obj(x={"type": "integer"}, y={"type": "integer"})}},
    {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    {"$ref": "#/$defs/tree", "$defs": {"tree": TREE}},
    obj(a={"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"enum": ["x", "y"]}}},
    obj(colour={"$ref": "#/$defs/colour"})
    | {"$defs": {"colour": {"type": "string", "enum": ["red", "green"], "title": "Colour"}}},
    obj(v={"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}]})
    | {"$defs": {"s": obj(w={"type": "number", "minimum": 0, "maximum": 5})}},
    {"allOf": [{"$ref": "#/$defs/n"}, {"maximum": 5}], "$defs": {"n": {"type": "integer", "minimum": 1}}},
    obj(a={"type": "integer"}, b={"$ref": "#/properties/a"}),
    obj(a={"$ref": "#/$defs/x%20y"}) | {"$defs": {"x y": {"const": 1}}},
    {
        "$defs": {"even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 10}},
        **arr({"$ref": "#/$defs/even"}, 3),
    },
]

# As libraries write them, titles, descriptions, defaults and dialects included.
DESCRIBED: list[Schema] = [
    {
        "title": "Weather",
        "type": "object",
        "properties": {
            "city": {"title": "City", **TEXT},
            "celsius": {"title": "C", "type": "number", "minimum": -90, "maximum": 60},
        },
        "required": ["city", "celsius"],
        "additionalProperties": False,
    },
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "description": "a flag",
        "type": "boolean",
        "default": False,
    },
    {
        "type": "object",
        "title": "Args",
        "description": "d",
        "properties": {"q": {"type": "string", "description": "what", "maxLength": 4, "examples": ["x"]}},
        "required": ["q"],
        "additionalProperties": False,
    },
    obj(step=arr(obj(explanation=TEXT, output=TEXT), 2, minItems=1), final_answer=TEXT),
    obj(
        unit={"type": "string", "enum": ["celsius", "fahrenheit"], "description": "unit", "default": "celsius"},
        days={"type": "integer", "minimum": 1, "maximum": 14},
    ),
    obj(entities=obj(attributes=arr(TEXT, 2), colours=arr({"enum": ["red", "blue"]}, 2), animals=arr(TEXT, 2))),
    obj(
        flagged={"type": "boolean"},
        category={"anyOf": [{"type": "string", "enum": ["violence", "other"]}, {"type": "null"}]},
    ),
    obj(
        date={"type": "string", "format": "date", "description": "ISO date"},
        attendees=arr(TEXT, 2),
        at={"type": "string", "format": "time"},
    ),
    {
        "type": "object",
        "properties": {
            "item": {"anyOf": [obj(name=TEXT, age={"type": "integer"}), obj(number={"type": "integer"}, street=TEXT)]}
        },
        "additionalProperties": False,
        "required": ["item"],
    },
    obj(
        query={"type": "string", "minLength": 1, "maxLength": 8},
        limit={"type": ["integer", "null"], "minimum": 1, "maximum": 50},
        sort={"enum": ["asc", "desc"]},
    ),
    obj("b", "d", a=TEXT, b=TEXT, c={"type": "integer"}, d=arr({"type": "integer"}, 2)),
    obj(id={"type": "string", "format": "uuid"}, ip={"type": "string", "format": "ipv4"}),
]

GROUPS: dict[str, list[Schema]] = {
    "scalars": SCALARS,
    "numbers": NUMBERS,
    "strings": STRINGS,
    "arrays": ARRAYS,
    "objects": OBJECTS,
    "combined": COMBINED,
    "references": REFERENCES,
    "described": DESCRIBED,
}
SCHEMAS = [schema for group in GROUPS.values() for schema in group]
