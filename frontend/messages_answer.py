"""A Messages answer, whole or as Anthropic's events."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from frontend import errors
from frontend.generation import Generation
from frontend.output_events import (
    Call,
    CallArguments,
    CallEnd,
    CallFailed,
    CallStart,
    Event,
    Reasoning,
    Text,
    settle,
)
from frontend.service import Service
from shared.errors import TandemError

PING_S = 15.0  # proxies and clients give up on connections that stay silent for longer than about a minute

_json = msgspec.json.encode


def _event(content: dict[str, Any]) -> bytes:
    kind: str = content["type"]
    return b"event: " + kind.encode() + b"\ndata: " + _json(content) + b"\n\n"


class MessagesAnswer:
    """Args: `shows_thinking` False leaves thinking blocks empty; `is_clamped`: the context ends before max_tokens."""

    ending = b""

    def __init__(
        self, service: Service, generation: Generation, request_id: str, *, shows_thinking: bool, is_clamped: bool
    ) -> None:
        self._generation = generation
        self._output = generation.outputs[0]
        self._request_id = request_id
        self._shows_thinking = shows_thinking
        self._is_clamped = is_clamped
        self._head: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": generation.outputs[0].submit.adapter or service.model_name,
        }

    def error_event(self, error: TandemError) -> bytes:
        return b"event: error\ndata: " + errors.messages_body_of(error, self._request_id) + b"\n\n"

    # ------------------------------------------------------------ not streamed

    async def whole(self) -> bytes:
        events: list[Event] = []
        async for deltas in self._generation.deltas():
            for delta in deltas:
                events += delta.events or [Text(delta.text)]
        content = [self._block(block) for block in settle(events) if not (isinstance(block, Text) and not block.text)]
        return _json({**self._head, "content": content, **self._end(), "usage": self._usage()})

    def _block(self, block: Text | Reasoning | Call) -> dict[str, Any]:
        match block:
            case Text(text):
                return {"type": "text", "text": text, "citations": None}
            case Reasoning(text):
                shown = text if self._shows_thinking else ""
                return {"type": "thinking", "thinking": shown, "signature": _signature(text)}
            case Call(call_id, name, arguments):
                return {"type": "tool_use", "id": call_id, "name": name, "input": msgspec.Raw(arguments.encode())}

    def _end(self) -> dict[str, Any]:
        output = self._output
        stop_string = output.stop_string
        if stop_string is not None:
            reason = "stop_sequence"
        elif output.finish_reason == "length":
            reason = "model_context_window_exceeded" if self._is_clamped else "max_tokens"
        else:
            reason = "tool_use" if output.num_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop_string}

    def _usage(self) -> dict[str, Any]:
        """`input_tokens` are those that were computed; before the end nobody knows how many were cached."""
        num_prompt = len(self._output.submit.prompt_token_ids)
        timings = self._output.timings
        num_cached = timings.num_cached_tokens if timings is not None else 0
        return {
            "input_tokens": num_prompt - num_cached,
            "cache_creation_input_tokens": 0,  # writing to the cache costs nothing here, so nothing is counted
            "cache_read_input_tokens": num_cached,
            "output_tokens": self._output.num_tokens,
        }

    # ------------------------------------------------------------ streamed

    async def events(self) -> AsyncIterator[bytes]:
        start = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}
        yield _event({"type": "message_start", "message": start}) + _event({"type": "ping"})
        blocks = _OpenBlock(shows_thinking=self._shows_thinking)
        async for deltas in self._generation.deltas(PING_S):
            parts = [] if deltas else [_event({"type": "ping"})]
            for delta in deltas:
                for item in delta.events or ([Text(delta.text)] if delta.text else []):
                    parts += blocks.show(item)
            if parts:
                yield b"".join(parts)
        end = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield b"".join([*blocks.close(), _event(end), _event({"type": "message_stop"})])


class _OpenBlock:
    """At most one content block is open at a time; a piece of another kind closes it."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1
        self._kind: str | None = None
        self._hash = hashlib.sha256()

    def show(self, item: Event) -> list[bytes]:
        match item:
            case Text(text) | CallFailed(_, text):
                parts = self._switch("text", {"type": "text", "text": ""})
                return [*parts, self._delta({"type": "text_delta", "text": text})]
            case Reasoning(text):
                parts = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                self._hash.update(text.encode())
                return (
                    [*parts, self._delta({"type": "thinking_delta", "thinking": text})]
                    if self._shows_thinking
                    else parts
                )
            case CallStart(_, call_id, name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return [*self.close(), *self._switch("tool_use", block)]
            case CallArguments(_, json):
                return [self._delta({"type": "input_json_delta", "partial_json": json})]
            case CallEnd():
                return self.close()

    def _switch(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if self._kind == kind:
            return []
        parts = self.close()
        self._kind = kind
        self._index += 1
        parts.append(_event({"type": "content_block_start", "index": self._index, "content_block": block}))
        return parts

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def close(self) -> list[bytes]:
        if self._kind is None:
            return []
        parts = []
        if self._kind == "thinking":
            parts.append(self._delta({"type": "signature_delta", "signature": self._hash.hexdigest()}))
            self._hash = hashlib.sha256()
        self._kind = None
        return [*parts, _event({"type": "content_block_stop", "index": self._index})]


def _signature(thinking: str) -> str:
    """Clients send it back with the block; it is not a secret and is not checked."""
    return hashlib.sha256(thinking.encode()).hexdigest()
