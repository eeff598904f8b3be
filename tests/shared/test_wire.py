"""Every message survives the wire, and bytes that are not one raise BadMessage."""

from __future__ import annotations

import typing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import messages, wire
from shared.errors import BadMessage
from shared.messages import Message

INTEGERS = st.integers(-(2**63), 2**64 - 1)  # what msgpack holds
FLOATS = st.floats(allow_nan=False)
MESSAGES = sorted(Message.__subclasses__(), key=lambda c: c.__name__)
DIRECTIONS = {
    name: getattr(messages, name)
    for name in ("ToScheduler", "FrontendToScheduler", "WorkerToScheduler", "ToFrontend", "ToTarget", "ToDrafter")
}


def values(type_: Any) -> st.SearchStrategy[Any]:
    """Random values of a field's type."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if arguments:  # a union with None
        return st.one_of([values(a) for a in arguments])
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        fields = {f.name: values(f.type) for f in msgspec.structs.fields(type_)}
        return st.builds(type_, **fields)
    if isinstance(type_, typing.NewType):
        return values(type_.__supertype__)
    simple = {
        int: INTEGERS,
        float: FLOATS,
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return simple[type_]


def structs(type_: type[Message]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(type_)
    return st.builds(type_, **{f.name: values(hints[f.name]) for f in msgspec.structs.fields(type_)})


@pytest.mark.parametrize("type_", MESSAGES, ids=lambda t: t.__name__)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire(type_: type[Message], data: st.DataObject) -> None:
    message = data.draw(structs(type_))
    assert wire.Decoder(type_).decode(wire.encode(message)) == message


def test_every_message_has_a_direction() -> None:
    directed = {t for union in DIRECTIONS.values() for t in typing.get_args(union)} | {messages.Features}
    assert directed == set(MESSAGES)


@pytest.mark.parametrize("union", DIRECTIONS.values(), ids=DIRECTIONS)
@settings(max_examples=100, deadline=None)
@given(frame=st.binary(max_size=64))
def test_random_bytes_are_bad_messages(union: Any, frame: bytes) -> None:
    with pytest.raises(BadMessage):
        wire.Decoder(union).decode(frame)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_truncated_messages_are_bad_messages(data: st.DataObject) -> None:
    message = data.draw(structs(messages.Submit))
    frame = wire.encode(message)
    length = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(BadMessage):
        wire.Decoder(messages.ToScheduler).decode(frame[:length])


@pytest.mark.parametrize(
    "change",
    [
        {"request_id": 5},
        {"max_tokens": "10"},
        {"max_tokens": 1.5},
        {"prompt_token_ids": [1, None]},
        {"sampling": {"temprature": 1.0}},
        {"max_token": 3},
        {"type": "Sumbit"},
        {"type": None},
    ],
    ids=str,
)
def test_wrong_types_unknown_fields_and_unknown_tags_are_bad_messages(change: dict[str, Any]) -> None:
    good = {"type": "Submit", "request_id": "r", "prompt_token_ids": [1], "sampling": {}, "max_tokens": 1}
    decoder = wire.Decoder(messages.ToScheduler)
    assert decoder.decode(msgspec.msgpack.encode(good)).max_tokens == 1
    with pytest.raises(BadMessage):
        decoder.decode(msgspec.msgpack.encode(good | change))


def test_a_message_of_the_other_direction_is_a_bad_message() -> None:
    frame = wire.encode(messages.Drain())
    assert wire.Decoder(messages.ToTarget).decode(frame) == messages.Drain()
    with pytest.raises(BadMessage):
        wire.Decoder(messages.ToScheduler).decode(frame)


def test_deep_nesting_and_huge_headers_are_bad_messages() -> None:
    decoder = wire.Decoder(messages.ToScheduler)
    for frame in (b"\x91" * 100_000, b"\xc0" * (wire.MAX_HEADER_BYTES + 1), b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(BadMessage):
            decoder.decode(frame)


@pytest.mark.parametrize(
    ("shapes", "frames"),
    [
        ([("float32", [2, 3])], []),
        ([("float32", [2, 3])], [bytes(23)]),
        ([("float32", [2, 3])], [bytes(24), b""]),
        ([("float32", [-2, -3])], [bytes(24)]),
        ([("object", [3])], [bytes(24)]),
        ([("float32", [2**40, 2**40])], [bytes(24)]),
    ],
)
def test_tensor_frames_must_be_as_described(shapes: list[tuple[str, list[int]]], frames: list[bytes]) -> None:
    wire.check_tensor_frames([("float32", [2, 3]), ("bfloat16", [])], [bytes(24), bytes(2)])
    with pytest.raises(BadMessage):
        wire.check_tensor_frames(shapes, frames)
