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
from tandem.fields import MEDIA, ONLY_CHAT, attach, expand, is_url, paths_of
from tandem.options import Message, Options

Prompt = str | Sequence[int] | Sequence[Message]
"""A text or its token ids, which the output goes on with, or a conversation, which it answers."""

_KINDS: dict[str, MediaKind] = dict(zip(MEDIA, ("image", "video", "audio"), strict=True))
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
    NotFound: no adapter has this name.
    """
    for name in options:
        if name not in Options.__annotations__:
            raise InvalidRequest(f"{name}: unknown or unsupported option", param=name)
    fields = expand(options)
    service.check_model(fields.get("model", ""))
    media = [_part(*item, kind) for name, kind in _KINDS.items() for item in paths_of(fields.pop(name, ()), name)]
    if not isinstance(prompt, str) and not _is_tokens(prompt):
        messages = attach([message for message in prompt if isinstance(message, Mapping)], media)
        return await prepare_chat(service, Caller(), from_content({**fields, "messages": messages}, ChatBody))
    for name in options:
        if name in ONLY_CHAT and options[name] is not None:
            raise InvalidRequest(f"{name}: needs messages, and the prompt is a text or tokens", param=name)
    top = fields.pop("top_logprobs", 0)
    if fields.pop("logprobs", False):
        fields["logprobs"] = top
    elif top:
        raise InvalidRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")
    text = prompt if isinstance(prompt, str) else list(prompt)
    return await prepare_completion(service, Caller(), from_content({**fields, "prompt": text}, CompletionBody))


def _part(path: str, place: str, kind: MediaKind) -> dict[str, Any]:
    """A content part that only this process can make: JSON has none that names a `MediaPart`."""
    part = MediaPart(kind, place, url=path)
    if not is_url(path):
        part = LocalFile(kind, place, url=str(Path(path).expanduser()))
    return {"type": _PART_TYPES[kind], "part": part}
