"""Content parts that are media, in the forms of the OpenAI and Anthropic APIs."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any

from frontend.media.fetch import fetch
from shared.config import Settings
from shared.errors import InvalidRequest
from shared.messages import MediaKind

MAX_ITEM_BYTES = 20 * 1024 * 1024
MEDIA_TYPES: dict[str, MediaKind] = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "input_audio": "audio",
}

_DATA_URI = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)


@dataclass(frozen=True)
class MediaPart:
    """One item as a request names it: base64 text in `data`, or something to fetch in `url`."""

    kind: MediaKind
    param: str  # the request's field
    data: str | None = None
    url: str | None = None

    async def read(self, settings: Settings) -> bytes:
        """Raises:
        InvalidRequest: not base64, too large, or not fetched.
        """
        if self.data is None:
            return await fetch(self.url or "", settings, param=self.param)
        if len(self.data) * 3 // 4 > MAX_ITEM_BYTES:
            raise InvalidRequest(f"{self.param}: more than {MAX_ITEM_BYTES} bytes", param=self.param)
        try:
            return base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(f"{self.param}: not valid base64", param=self.param) from error


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "m4a")


def audio_part(part: dict[str, Any], place: str) -> MediaPart:
    """{"type": "input_audio", "input_audio": {"data": base64 or a data URI of it, "format": ...}}.

    The format is checked and then not used: what the bytes are is found from the bytes.

    Raises:
        InvalidRequest: a field is missing, unknown or of a wrong type.
    """
    where = f"{place}.input_audio"
    source = part.get("input_audio")
    if not isinstance(source, dict):
        raise InvalidRequest(f"{where}: expected an object", param=where)
    unknown = [f"{place}.{name}" for name in part if name not in ("type", "input_audio")]
    unknown += [f"{where}.{name}" for name in source if name not in ("data", "format")]
    if unknown:
        raise InvalidRequest(f"{unknown[0]}: unknown or unsupported field", param=unknown[0])
    data, form = source.get("data"), source.get("format")
    if not isinstance(data, str) or not data:
        raise InvalidRequest(f"{where}.data: expected base64", param=f"{where}.data")
    if form is not None and (not isinstance(form, str) or form.lower() not in AUDIO_FORMATS):
        text = f"{where}.format: {str(form)[:40]!r} is none of {', '.join(AUDIO_FORMATS)}"
        raise InvalidRequest(text, param=f"{where}.format")
    if data[:5].lower() == "data:":
        return from_url("audio", data, f"{where}.data")
    return MediaPart("audio", f"{where}.data", data=data)


def chat_part(part: dict[str, Any], place: str) -> MediaPart:
    """An OpenAI part: {"type": "image_url", "image_url": {"url": ...}}, or with the URL itself in place of the object.

    Raises:
        InvalidRequest: a field is missing, unknown or of a wrong type.
    """
    name = part["type"]
    if name == "input_audio":
        return audio_part(part, place)
    key = name if name in part else "image_url"
    source = part.get(key)
    where = f"{place}.{key}"
    for other in part:
        if other not in ("type", key, "detail"):
            raise InvalidRequest(f"{place}.{other}: unknown or unsupported field", param=f"{place}.{other}")
    if isinstance(source, dict):
        for other in source:
            if other not in ("url", "detail"):
                raise InvalidRequest(f"{where}.{other}: unknown or unsupported field", param=f"{where}.{other}")
        source, where = source.get("url"), f"{where}.url"
    if not isinstance(source, str) or not source:
        raise InvalidRequest(f"{where}: expected a URL", param=where)
    return from_url(MEDIA_TYPES[name], source, where)


def from_url(kind: MediaKind, url: str, param: str) -> MediaPart:
    """Raises:
    InvalidRequest: a data URI without base64.
    """
    if url[:5].lower() != "data:":
        return MediaPart(kind, param, url=url)
    match = _DATA_URI.match(url[:256])
    if match is None:
        raise InvalidRequest(f"{param}: a data URI must be data:TYPE/SUBTYPE;base64,DATA", param=param)
    return MediaPart(kind, param, data=url[match.end() :])


# Most templates write a tool's result as text, so that its images have no place there: they follow in a user's turn.
RESULT_IMAGE = "(image: it follows the tool results)"


def result_image(part: MediaPart, tool: str) -> list[dict[str, Any]]:
    """An image of a tool's result as content parts of the user's turn after all results."""
    return [{"type": "text", "text": f"Image in the result of {tool}:\n"}, {"type": "image_url", "part": part}]


def anthropic_source(source: dict[str, Any], place: str) -> MediaPart:
    """An image block's source: {"type": "base64", "media_type": ..., "data": ...} or {"type": "url", "url": ...}.

    Raises:
        InvalidRequest: a field is missing, unknown or of a wrong type.
    """
    fields = {"base64": ("media_type", "data"), "url": ("url",)}.get(str(source.get("type")))
    if fields is None:
        text = f"{place}.type: {source.get('type')!r} is not supported (base64, url)"
        raise InvalidRequest(text, param=f"{place}.type")
    for name in source:
        if name != "type" and name not in fields:
            raise InvalidRequest(f"{place}.{name}: unknown or unsupported field", param=f"{place}.{name}")
    for name in fields:
        if not isinstance(source.get(name), str):
            raise InvalidRequest(f"{place}.{name}: expected `str`", param=f"{place}.{name}")
    where = f"{place}.{fields[-1]}"
    if "data" in fields:
        return MediaPart("image", where, data=source["data"])
    return from_url("image", source["url"], where)
