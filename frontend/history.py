"""Calls of former turns, whose arguments a client sends back as text, in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from frontend.tools.wide_numbers import read_json
from shared.errors import InvalidRequest


def arguments_of(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Templates print arguments as JSON, so a string would be quoted twice; one that is no JSON stays a string.

    Nothing stands for no arguments: some servers stream it so.
    """
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        pass
    try:
        return read_json(text)  # it is slower, and knows numbers of any size
    except (ValueError, RecursionError):
        return text


def write_history(write: Callable[[list[dict[str, Any]]], str], messages: Sequence[dict[str, Any]], param: str) -> str:
    """The prompt that `write` makes of messages as templates take them.

    Some templates write the members of a call's arguments one by one. Where the arguments are no object they fail with
    words that name neither the call nor the reason, so that a client would search in vain: here it is told.

    Args:
        param: the request's field that holds the conversation.
    Raises:
        InvalidRequest: the template refuses the messages.
    """
    plain = list(messages)
    try:
        return write(plain)
    except InvalidRequest as error:
        found = next(_without_object(plain), None)
        if found is None or not _is_accepted(write, plain):
            raise InvalidRequest(error.message, param=param if error.param == "messages" else error.param) from error
        name = found["function"]["name"]
        text = (
            f"{param}: the arguments of the call {found['id']!r} of {name!r} are not a JSON object, and the model's "
            "chat template writes them member by member; leave the call out or send an object"
        )
        raise InvalidRequest(text, param=param) from error


def _without_object(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls", ()):
            if not isinstance(call["function"]["arguments"], dict):
                yield call


def _is_accepted(write: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> bool:
    """Whether it is the arguments that the template does not take: with objects in their place it takes the rest."""
    kept = []
    for message in messages:
        calls = [
            call if isinstance(call["function"]["arguments"], dict)
            else {**call, "function": {**call["function"], "arguments": {}}}
            for call in message.get("tool_calls", ())
        ]  # fmt: skip
        kept.append({**message, "tool_calls": calls} if calls else message)
    try:
        write(kept)
    except InvalidRequest:
        return False
    return True
