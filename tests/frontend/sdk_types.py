"""The SDKs' request types as a tree of places, each with bodies that put a value there.

The SDKs describe a request as TypedDicts in TypedDicts. `Object.children` goes down by one; who walks them may leave
out a branch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

Json = dict[str, Any]
Put = Callable[[Any], Json]  # a value -> the body that has it in this place

_PLAIN: dict[Any, list[Any]] = {str: ["x", "y y"], int: [1, 2], float: [0.5, 0.25], bool: [True, False], object: ["x"]}
_PLAIN[Any] = _PLAIN[object]


@dataclass(frozen=True)
class Samples:
    """What types do not tell: values that are valid where "x" is not, and what has to stand around an object."""

    values: dict[tuple[str, str], list[Any]]  # (type's name, field) -> values to try; the first goes with others
    also: dict[str, set[str]] = dataclasses.field(default_factory=dict)  # type's name -> fields needed in this form
    before: dict[str, list[Any]] = dataclasses.field(
        default_factory=dict
    )  # type's name -> elements before it in a list
    after: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def of(self, kind: Any) -> list[Any]:
        """Values of a type, each different from the others; none where JSON has no such value."""
        if is_typeddict(kind):
            return [self.smallest(kind)]
        origin, args = get_origin(kind), get_args(kind)
        if origin is Literal:
            return list(args)
        if origin in (Union, UnionType):
            return [value for each in args if each is not NoneType for value in self.of(each)]
        if origin is dict:
            return [{}, {"k": self.of(args[1])[0]}]
        if origin is not None and len(args) == 1:
            return [[value] for value in self.of(args[0])]
        return _PLAIN.get(kind, [])

    def field(self, owner: Any, name: str, kind: Any) -> list[Any]:
        return self.values.get((owner.__name__, name)) or self.of(kind)

    def smallest(self, kind: Any) -> Json:
        """The required fields only."""
        hints = hints_of(kind)
        needed = required(kind) | self.also.get(kind.__name__, set())
        return {name: self.field(kind, name, hints[name])[0] for name in hints if name in needed}


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> type. Kept, for it takes milliseconds to find."""
    return get_type_hints(kind)


@functools.cache
def required(kind: Any) -> set[str]:
    """Its fields that must be there. `__required_keys__` alone does not see `Required` in annotations that are text."""
    marks = {name: get_origin(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}
    return {n for n, m in marks.items() if m is Required or (n in kind.__required_keys__ and m is not NotRequired)}


@dataclass(frozen=True)
class Object:
    """A TypedDict in its place: `put` makes the body that has a value there."""

    kind: Any
    path: str  # "messages.content.source"; lists leave no trace in it
    put: Put
    samples: Samples
    above: str = ""  # the path with the types of the objects around: "messages[user].content[image].source"

    @property
    def fields(self) -> dict[str, Any]:
        return hints_of(self.kind)

    @property
    def smallest(self) -> Json:
        return self.samples.smallest(self.kind)

    @property
    def tags(self) -> set[str]:
        """The fields that tell it from others in its place."""
        return {name for name in ("type", "role") if _literals(self.fields.get(name))}

    @property
    def label(self) -> str:
        """`above` with its own type."""
        tag = next((str(_literals(self.fields[name])[0]) for name in ("type", "role") if name in self.tags), "")
        return f"{self.above}[{tag}]" if tag else self.above

    def tells_nothing(self, field: str) -> bool:
        """It is always there, with one value."""
        return field in self.smallest and len(_literals(self.fields[field])) == 1

    def place(self, field: str) -> str:
        return f"{self.path}.{field}" if self.path else field

    def labelled(self, field: str) -> str:
        return f"{self.label}.{field}" if self.path else field

    def is_given(self, field: str) -> bool:
        """Its samples are written down, not made from its type."""
        return (self.kind.__name__, field) in self.samples.values

    def values(self, field: str) -> list[Any]:
        return self.samples.field(self.kind, field, self.fields[field])

    def children(self, field: str) -> Iterator[Object]:
        """The objects that may stand in a field."""

        def put(value: object) -> Json:
            return self.put({**self.smallest, field: value})

        yield from _objects(self.fields[field], self.place(field), put, self.samples, self.labelled(field))


def _literals(kind: Any) -> tuple[Any, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return tuple(value for each in get_args(kind) for value in _literals(each))
    return ()


def _objects(kind: Any, path: str, put: Put, samples: Samples, above: str) -> Iterator[Object]:
    if is_typeddict(kind):
        yield Object(kind, path, put, samples, above)
        return
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in args:
            yield from _objects(each, path, put, samples, above)
    elif origin is not dict and origin is not Literal and len(args) == 1:
        for inner in _objects(args[0], path, lambda value: put([value]), samples, above):
            name = inner.kind.__name__
            before, after = samples.before.get(name, []), samples.after.get(name, [])

            def put_among(value: object, before: list[Any] = before, after: list[Any] = after) -> Json:
                return put([*before, value, *after])

            yield Object(inner.kind, path, put_among, samples, above)
