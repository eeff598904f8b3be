"""A conversation with a running server: its messages, and one streamed answer at a time."""

from __future__ import annotations

import base64
import json
import mimetypes
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
from msgspec import Struct

from shared.errors import InvalidRequest, Unavailable
from tandem.connection import refusal, unreachable

MAX_IMAGE_BYTES = 20 << 20  # in base64 still below a server's usual limit of a body


class Piece(Struct, frozen=True):
    """A bit of an answer, or what the server measured at its end."""

    kind: Literal["reasoning", "text", "timings"]
    text: str = ""
    timings: dict[str, Any] | None = None


class Conversation:
    """The messages so far. `sampling` is sent with every request."""

    def __init__(self, client: httpx.Client, model: str, system: str | None, sampling: dict[str, Any]) -> None:
        self.client = client
        self.model = model
        self.system = system
        self.sampling = sampling
        self.images: list[str] = []  # data URLs that go with the next message
        self.messages: list[dict[str, Any]] = []

    def clear(self) -> None:
        self.messages, self.images = [], []

    def add_image(self, path: str) -> int:
        """Put an image beside the next message; its size in bytes.

        Raises:
            InvalidRequest: there is no such file, it is no image by its name, or too large.
        """
        file = Path(path).expanduser()
        kind = mimetypes.guess_type(file.name)[0] or ""
        if not kind.startswith("image/"):
            raise InvalidRequest(f"{path}: its name is not that of an image (.png, .jpg, .webp, ...)")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror}") from error
        if len(content) > MAX_IMAGE_BYTES:
            raise InvalidRequest(f"{path} has more than {MAX_IMAGE_BYTES >> 20} MiB")
        self.images.append(f"data:{kind};base64,{base64.b64encode(content).decode()}")
        return len(content)

    def ask(self, text: str) -> Generator[Piece, None, None]:
        """Stream the answer to `text`. What was received is kept as history, also of an answer that was stopped.

        Closing the iterator closes the connection, by which the server stops. A request that fails before its first
        piece leaves no trace, so that the next one does not fail for the same reason.

        Raises:
            Unavailable: the server is gone, or ended the answer with an error.
            InvalidRequest: the server refuses the request.
        """
        content: str | list[dict[str, Any]] = text
        if self.images:
            images = [{"type": "image_url", "image_url": {"url": url}} for url in self.images]
            content = [*images, {"type": "text", "text": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": content}
        body = {
            "model": self.model,
            "messages": [*system, *self.messages, asked],
            "stream": True,
            **self.sampling,
        }
        self.images = []
        answer = ""
        try:
            for piece in self._stream(body):
                answer += piece.text if piece.kind == "text" else ""
                yield piece
        finally:
            if answer:
                self.messages += [asked, {"role": "assistant", "content": answer}]

    def _stream(self, body: dict[str, Any]) -> Iterator[Piece]:
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    is_refused = httpx.codes.is_client_error(response.status_code)
                    raise (InvalidRequest if is_refused else Unavailable)(refusal(response))
                for line in response.iter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield from _pieces(json.loads(line[len("data: ") :]))
        except httpx.HTTPError as error:
            raise unreachable(self.client, error) from error


def _pieces(event: dict[str, Any]) -> Iterator[Piece]:
    if "error" in event:
        raise Unavailable(f"the answer broke off: {event['error'].get('message', event['error'])}")
    for choice in event.get("choices", []):
        delta = choice.get("delta", {})
        if delta.get("reasoning_content"):
            yield Piece("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            yield Piece("text", delta["content"])
    if event.get("timings"):
        yield Piece("timings", timings=event["timings"])


def summary(timings: dict[str, Any]) -> str:
    """ "41 tokens, 23.5 tokens/s, drafts accepted 12 of 20 (60%), 64 prompt tokens cached, first token in 0.31 s"."""
    parts = [f"{timings['predicted_n']} tokens", f"{timings['predicted_per_second']:.1f} tokens/s"]
    drafted, accepted = timings["draft_n"], timings["draft_n_accepted"]
    parts.append(f"drafts accepted {accepted} of {drafted} ({accepted / drafted:.0%})" if drafted else "no drafts")
    if timings["cache_n"]:
        parts.append(f"{timings['cache_n']} prompt tokens cached")
    parts.append(f"first token in {(timings['queue_ms'] + timings['prompt_ms']) / 1e3:.2f} s")
    return ", ".join(parts)
