"""From a caller's options to the fields of a request body."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from shared.errors import InvalidRequest
from tandem.options import Options, SamplingOptions

_SHORT = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
MEDIA = ("images", "videos", "audio")
ONLY_CHAT = frozenset(Options.__annotations__) - frozenset(SamplingOptions.__annotations__)


def expand(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, the shorter ways written as the API has them.

    Raises:
        InvalidRequest: two of them ask for different formats.
    """
    fields = {name: value for name, value in options.items() if value is not None}
    if "adapter" in fields:
        fields["model"] = fields.pop("adapter")
    given = [name for name in _SHORT if name in fields]
    if len(given) + ("structured_outputs" in fields) > 1:
        text = f"{given[0]}: only one of structured_outputs, {', '.join(_SHORT)} can be given"
        raise InvalidRequest(text, param=given[0])
    for name in given:
        fields["structured_outputs"] = {_SHORT[name]: fields.pop(name)}
    if isinstance(fields.get("logit_bias"), Mapping):
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def paths_of(value: Any, name: str) -> list[tuple[str, str]]:  # noqa: ANN401 - checked here
    """(path or URL, the option's place) of each medium; one alone need not be in a list.

    Raises:
        InvalidRequest: it is no path.
    """
    paths = [value] if isinstance(value, str | PathLike) else value
    if not isinstance(paths, Sequence) or any(not isinstance(path, str | PathLike) for path in paths):
        raise InvalidRequest(f"{name}: expected paths or URLs", param=name)
    return [(str(path), f"{name}[{i}]") for i, path in enumerate(paths)]


def is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def attach(messages: Sequence[Mapping[str, Any]], media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with media parts before the text of the last user message.

    Raises:
        InvalidRequest: there is none.
    """
    copied = [dict(message) for message in messages]
    for message in reversed(copied if media else []):
        if message.get("role") == "user":
            content = message.get("content")
            text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
            message["content"] = [*media, *text]
            return copied
    if media:
        raise InvalidRequest("messages: media need a user message to stand in", param="messages")
    return copied
