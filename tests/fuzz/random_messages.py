"""Messages with the right fields and wild values, and bytes that once were messages."""

from __future__ import annotations

import math
import random
from typing import Any, get_args

import msgspec
from msgspec import inspect

from shared.messages import Message, ToDrafter, ToFrontend, ToScheduler, ToTarget
from shared.wire import encode

TYPES: list[type[Message]] = sorted(
    {t for union in (ToScheduler, ToFrontend, ToTarget, ToDrafter) for t in get_args(union)}, key=lambda t: t.__name__
)
INTEGERS = (0, 1, 2, 3, 7, 64, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, -1, -2, -(1 << 63))
FLOATS = (0.0, 1.0, -1.0, 1e-300, 1e300, math.inf, -math.inf, math.nan)
TEXTS = ("", "a", "b", "r0", "r1", "front", "\0", "\N{SNOWMAN}", "x" * 300)


def random_message(rng: random.Random, kinds: list[type[Message]] = TYPES) -> Message:
    message: Message = _struct(rng.choice(kinds), rng)
    return message


def _struct(kind: type[msgspec.Struct], rng: random.Random) -> Any:
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        if not field.required and rng.random() < 0.5:
            continue
        values[field.name] = _value(inspect.type_info(field.type), rng)
    return kind(**values)


def _value(info: inspect.Type, rng: random.Random) -> Any:
    match info:
        case inspect.IntType():
            return rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(8)
        case inspect.FloatType():
            return rng.choice(FLOATS)
        case inspect.StrType():
            return rng.choice(TEXTS)
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.BytesType():
            return rng.randbytes(rng.choice((0, 1, 16, 32)))
        case inspect.NoneType():
            return None
        case inspect.LiteralType():
            return rng.choice(info.values)
        case inspect.UnionType():
            return _value(rng.choice(info.types), rng)
        case inspect.ListType():
            return [_value(info.item_type, rng) for _ in range(rng.choice((0, 1, 1, 2, 3, 17)))]
        case inspect.DictType():
            return {_value(info.key_type, rng): _value(info.value_type, rng) for _ in range(rng.choice((0, 1, 3)))}
        case inspect.StructType():
            return _struct(info.cls, rng)
        case _:
            raise AssertionError(f"a message has a field of type {info}, which this does not make yet")


def damaged(frame: bytes, rng: random.Random) -> bytes:
    """The frame with a few bytes changed, cut, repeated or put in."""
    data = bytearray(frame)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if data:
                data[at % len(data)] = rng.randrange(256)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                data += data[at : at + 40]
    return bytes(data)


def random_frame(rng: random.Random) -> bytes:
    """A third each: a whole message, a damaged one, noise."""
    match rng.randrange(3):
        case 0:
            return encode(random_message(rng))
        case 1:
            return damaged(encode(random_message(rng)), rng)
        case _:
            return rng.randbytes(rng.randrange(60))
