"""From deltas to the bytes of an answer: what chat and plain completions share. Each API gives its own shapes."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from frontend import errors
from frontend.generation import ClientWatcher, Delta, Generation, TokenText
from frontend.origins import TokenOrigin
from frontend.output_events import Event, Text
from frontend.pieces import Pieces
from frontend.schemas import GenerationBody
from frontend.service import Service
from frontend.sse import DONE, EventStream, event
from frontend.usage import timings, usage
from shared.errors import InvalidRequest, TandemError

ACCEPT_WAIT_S = 0.5  # a refusal comes at once; after this long the request is queued and the stream may begin

_json = msgspec.json.encode


class Writer(Protocol):
    """An answer in some API's shapes."""

    ending: bytes  # after the last event

    async def whole(self) -> bytes: ...

    def events(self) -> AsyncIterator[bytes]: ...

    def error_event(self, error: TandemError) -> bytes: ...


class Held:
    """What is known of tokens whose text is still held back: it goes with the next chunk of their sequence."""

    def __init__(self) -> None:
        self.tokens: list[TokenText] = []
        self.origins: list[TokenOrigin] = []

    def add(self, delta: Delta) -> None:
        self.tokens.extend(delta.tokens)
        self.origins.extend(delta.origins)

    def take(self) -> tuple[list[TokenText], list[TokenOrigin]]:
        taken = self.tokens, self.origins
        self.tokens, self.origins = [], []
        return taken


class Answer(ABC):
    """Writes one request's deltas in OpenAI's shapes, as chunks or as a whole."""

    ending = DONE

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, service: Service, body: GenerationBody, generation: Generation) -> None:
        self.pieces: Pieces = service.pieces
        self._generation = generation
        self._includes_usage = body.stream_options is not None and body.stream_options.include_usage
        self._returns_origins = body.return_token_origins
        self._tells_tokens = body.return_token_origins or any(
            text.submit.sampling.num_logprobs is not None for text in generation.outputs
        )
        info = service.engine.require_target()
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object if body.stream else self.whole_object,
            "created": int(time.time()),
            "model": service.shown_name(body.model),
            "system_fingerprint": info.fingerprint,
        }

    @abstractmethod
    def whole_choice(self, events: list[Event], tokens: list[TokenText]) -> dict[str, Any]:
        """A choice of the answer that is not streamed, without index and finish_reason."""

    @abstractmethod
    def chunk_choice(self, text: str, tokens: list[TokenText]) -> dict[str, Any]:
        """A choice of a chunk, without index and finish_reason. Empty text: nothing but logprobs to tell."""

    @abstractmethod
    def text_template(self) -> tuple[bytes, bytes]:
        """JSON members of a chunk's choice before and after its text, for chunks without logprobs."""

    def event_choice(self, event: Event, tokens: list[TokenText]) -> dict[str, Any] | None:
        """A choice of a chunk for what is not text; None where it shows nothing."""
        raise AssertionError(f"{type(self).__name__} has text only, got {event}")

    def finish_reason(self, index: int) -> str | None:
        """What clients are told, which may say more than the engine's word."""
        return self._generation.outputs[index].finish_reason

    def first_choice(self) -> dict[str, Any] | None:
        """A choice to open each sequence with, before any text."""
        return None

    def error_event(self, error: TandemError) -> bytes:
        return event(errors.body_of(error))

    # ------------------------------------------------------------ not streamed

    async def whole(self) -> bytes:
        outputs = self._generation.outputs
        events: list[list[Event]] = [[] for _ in outputs]
        held = [Held() for _ in outputs]
        async for deltas in self._generation.deltas():
            for delta in deltas:
                events[delta.index] += delta.events or [Text(delta.text)]
                held[delta.index].add(delta)
        choices = []
        for i in range(len(outputs)):
            tokens, origins = held[i].take()
            choice = {"index": i, **self.whole_choice(events[i], tokens), "finish_reason": self.finish_reason(i)}
            choices.append(choice | self._extension(i, origins))
        answer = {**self._head, "choices": choices, "usage": usage(self._generation)}
        return _json(answer | {"timings": timings(self._generation)})

    # ------------------------------------------------------------ streamed

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks. One with text alone is joined from bytes prepared here: 1 microsecond instead of 15."""
        num_open = len(self._generation.outputs)
        before, after = self.text_template()
        head = b"data: " + _json(self._head)[:-1] + b',"choices":[{"index":'
        befores = [head + b"%d," % i + before for i in range(num_open)]
        after += b',"finish_reason":null}]' + (b',"usage":null' if self._includes_usage else b"") + b"}\n\n"

        first = self.first_choice()
        if first is not None:
            yield b"".join(event(_json(self._chunk(i, first))) for i in range(num_open))
        held = [Held() for _ in range(num_open)]
        async for deltas in self._generation.deltas():
            parts: list[bytes] = []
            for delta in deltas:
                if self._tells_tokens:
                    held[delta.index].add(delta)
                if delta.events:
                    parts += self._special_events(delta, held[delta.index])
                elif delta.text and not self._tells_tokens:
                    parts += (befores[delta.index], _json(delta.text), after)
                elif delta.text:
                    parts.append(self._text_event(delta.index, delta.text, held[delta.index]))
                if delta.finish_reason is not None:
                    num_open -= 1
                    parts.append(self._finish_event(delta.index, held[delta.index], is_last=num_open == 0))
            if parts:
                yield b"".join(parts)
        if self._includes_usage:
            yield event(_json({**self._head, "choices": [], "usage": usage(self._generation)}))

    def _chunk(self, index: int, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        chunk = {**self._head, "choices": [{"index": index, **choice, "finish_reason": finish_reason}]}
        return chunk | {"usage": None} if self._includes_usage else chunk

    def _extension(self, index: int, origins: list[TokenOrigin]) -> dict[str, Any]:
        """What a choice tells beyond OpenAI's fields: origins of its tokens, and the counts of drafts so far."""
        if not self._returns_origins:
            return {}
        counts = self._generation.outputs[index].draft_counts
        told = {"origins": origins, "draft_n": counts.num_draft_tokens, "draft_n_accepted": counts.num_accepted}
        return {"tandem": told}

    def _text_event(self, index: int, text: str, held: Held) -> bytes:
        tokens, origins = held.take()
        choice = self.chunk_choice(text, tokens)
        return event(_json(self._chunk(index, choice | self._extension(index, origins))))

    def _special_events(self, delta: Delta, held: Held) -> list[bytes]:
        """One chunk for each event; what is told of tokens goes with the first."""
        parts: list[bytes] = []
        for item in delta.events:
            if isinstance(item, Text):
                parts.append(self._text_event(delta.index, item.text, held))
            elif (choice := self.event_choice(item, held.tokens)) is not None:
                _, origins = held.take()
                parts.append(event(_json(self._chunk(delta.index, choice | self._extension(delta.index, origins)))))
        return parts

    def _finish_event(self, index: int, held: Held, *, is_last: bool) -> bytes:
        tokens, origins = held.take()
        choice = self.chunk_choice("", tokens) | self._extension(index, origins)
        chunk = self._chunk(index, choice, self.finish_reason(index))
        return event(_json(chunk | {"timings": timings(self._generation)} if is_last else chunk))


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: needs stream to be true", param="stream_options")


async def respond(request: Request, body: GenerationBody, generation: Generation, answer: Writer) -> Response:
    """Run a prepared request and answer it, streaming or not.

    Raises:
        TandemError: the engine refused it or failed before anything was sent.
    """
    generation.start()
    watcher = ClientWatcher(request, generation)
    try:
        if body.stream:
            await generation.wait_accepted(ACCEPT_WAIT_S)
            return EventStream(answer.events(), watcher, answer.error_event, answer.ending)
        content = await answer.whole()
    except BaseException:
        watcher.close()
        raise
    watcher.close()
    return errors.json_response(content)
