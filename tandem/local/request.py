"""From a Python call to the request that the HTTP API would get, and to sequences that are ready to start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontend.caller import Caller
from frontend.chat import prepare_chat
from frontend.completions import prepare_completion
from frontend.generation import Generation
from frontend.media.parts import MEDIA_TYPES, MediaPart
from frontend.schemas import ChatBody, CompletionBody, from_content
from frontend.service import Service
from shared.config import Settings
from shared.errors import InvalidRequest
from shared.messages import MediaKind
from tandem.options import ChatOptions, Message, Options, SamplingOptions

Prompt = str | Sequence[int] | Sequence[Message]
"""A text or its token ids, which the output goes on with, or a conversation, which it answers."""

_SHORT = {"json_schema": "json", "regex": "regex", "choice": "choice", "grammar": "grammar"}
_MEDIA: dict[str, MediaKind] = {"images": "image", "videos": "video", "audio": "audio"}
_ONLY_CHAT = frozenset(Options.__annotations__) - frozenset(SamplingOptions.__annotations__)
_PART_TYPES: dict[MediaKind, str] = {kind: name for name, kind in MEDIA_TYPES.items()}


@dataclass(frozen=True)
class LocalFile(MediaPart):
    """A file that the caller of this process names: it is read with the rights of this process."""

    async def read(self, settings: Settings) -> bytes:
        path = Path(self.url or "")
        try:
            if path.stat().st_size > settings.media_max_bytes:
                raise InvalidRequest(f"{self.param}: larger than {settings.media_max_bytes} bytes", param=self.param)
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise InvalidRequest(f"{self.param}: {path}: {error.strerror}", param=self.param) from error


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether several were given.

    Raises:
        InvalidRequest: it is nothing of that.
    """
    if isinstance(prompt, str):
        return [prompt], False
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidRequest("prompt: expected a text, token ids, messages, or a list of these", param="prompt")
    if _is_tokens(prompt) or _is_conversation(prompt):
        return [prompt], False  # type: ignore[list-item]  # as was just found
    for item in prompt:
        if not isinstance(item, str) and not (
            isinstance(item, Sequence) and (_is_tokens(item) or _is_conversation(item))
        ):
            text = "prompt: several prompts are each a text, token ids or messages"
            raise InvalidRequest(text, param="prompt")
    return list(prompt), True  # type: ignore[arg-type]  # as was just found


def _is_tokens(items: Sequence[Any]) -> bool:
    return bool(items) and all(type(item) is int for item in items)


def _is_conversation(items: Sequence[Any]) -> bool:
    return bool(items) and all(isinstance(item, Mapping) for item in items)


async def prepare(service: Service, prompt: Prompt, options: Mapping[str, Any]) -> Generation:
    """Raises:
    InvalidRequest: an option is unknown, out of place, out of range, or does not fit the model.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise InvalidRequest(f"{name}: unknown or unsupported option", param=name)
    fields = {name: value for name, value in options.items() if value is not None}
    _expand(fields)
    media = [part for name, kind in _MEDIA.items() for part in _parts(fields.pop(name, ()), kind, name)]
    if isinstance(prompt, str) or _is_tokens(prompt):
        for name in options:
            if name in _ONLY_CHAT and options[name] is not None:
                raise InvalidRequest(f"{name}: needs messages, and the prompt is a text or tokens", param=name)
        top = fields.pop("top_logprobs", 0)
        if fields.pop("logprobs", False):
            fields["logprobs"] = top
        elif top:
            raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
        text = prompt if isinstance(prompt, str) else list(prompt)
        return await prepare_completion(service, Caller(), from_content({**fields, "prompt": text}, CompletionBody))
    messages = [dict(message) for message in prompt if isinstance(message, Mapping)]
    if media:
        _attach(messages, media)
    return await prepare_chat(service, Caller(), from_content({**fields, "messages": messages}, ChatBody))


def _expand(fields: dict[str, Any]) -> None:
    """The shorter ways, as the API has them."""
    given = [name for name in _SHORT if name in fields]
    if len(given) + ("structured_outputs" in fields) > 1:
        text = f"{given[0]}: only one of structured_outputs, {', '.join(_SHORT)} can be given"
        raise InvalidRequest(text, param=given[0])
    for name in given:
        fields["structured_outputs"] = {_SHORT[name]: fields.pop(name)}
    if isinstance(fields.get("logit_bias"), Mapping):
        fields["logit_bias"] = {str(token): bias for token, bias in fields["logit_bias"].items()}
    for name in ("stop", "stop_token_ids", "tools"):
        if isinstance(fields.get(name), tuple):
            fields[name] = list(fields[name])


def _parts(paths: Any, kind: MediaKind, name: str) -> list[dict[str, Any]]:  # noqa: ANN401 - checked here
    if isinstance(paths, str | Path):
        paths = [paths]
    return [_part(path, kind, f"{name}[{i}]") for i, path in enumerate(paths)]


def _part(path: Any, kind: MediaKind, place: str) -> dict[str, Any]:  # noqa: ANN401 - checked here
    """The content part that prompts.py knows; one that cannot come in JSON."""
    if isinstance(path, str) and path[:7].lower() in ("http://", "https:/"):
        part = MediaPart(kind, place, url=path)
    else:
        try:
            part = LocalFile(kind, place, url=str(Path(path).expanduser()))
        except TypeError as error:
            raise InvalidRequest(f"{place}: expected a path", param=place) from error
    return {"type": _PART_TYPES[kind], "part": part}


def _attach(messages: list[dict[str, Any]], media: list[dict[str, Any]]) -> None:
    """Put media before the text of the last user message."""
    for message in reversed(messages):
        if message.get("role") == "user":
            content = message.get("content")
            text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or [])
            message["content"] = [*media, *text]
            return
    raise InvalidRequest("messages: media need a user message to stand in", param="messages")


__all__ = ["ChatOptions", "LocalFile", "Prompt", "prepare", "prompts_of"]
