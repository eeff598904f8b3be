"""One response from its first token to its last event. It is a Writer of frontend.answer and a Run of state.py."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from frontend.generation import Delta, Generation, TokenText
from frontend.output_events import Text
from frontend.pieces import Pieces
from frontend.responses.context import Context
from frontend.responses.event_log import EventLog
from frontend.responses.output import OutputItems, new_id
from frontend.responses.schemas import ResponsesBody
from frontend.responses.seal import seal
from frontend.responses.store import Stored
from frontend.service import Service
from frontend.streams import ClientGone
from frontend.usage import timings
from shared.errors import Busy, ContextLength, TandemError, Unavailable

log = logging.getLogger("frontend")

QUIET_S = 15.0  # then response.in_progress is repeated: clients give up on streams that stay silent

Json = dict[str, Any]
_json = msgspec.json.encode


def take_tokens(pending: list[TokenText], text: str, pieces: Pieces) -> list[TokenText]:
    """The tokens that wrote `text`, without those before it (of reasoning, markers, calls). They leave `pending`.

    Text comes as soon as it is known to be text, so it is the last thing that looks like it.
    """
    if not pending:
        return []
    parts = [pieces.bytes_of(token.token_id) for token in pending]
    written = text.encode()
    start = b"".join(parts).rfind(written)
    if start < 0:  # the detokenizer drops a space at a text's very beginning
        taken = list(pending)
        pending.clear()
        return taken
    end, place, first, last = start + len(written), 0, len(parts), len(parts)
    for i, part in enumerate(parts):
        if place < end:
            last = i + 1
        place += len(part)
        if place > start and first == len(parts):
            first = i
    taken = pending[first:last]
    del pending[:last]
    return taken


def event_bytes(content: Json) -> bytes:
    kind: str = content["type"]
    return b"event: " + kind.encode() + b"\ndata: " + _json(content) + b"\n\n"


class ResponseRun:
    ending = b""

    def __init__(self, service: Service, body: ResponsesBody, context: Context, generation: Generation) -> None:
        self.tenant = context.tenant
        self.is_background = body.background
        self._service = service
        self._context = context
        self._generation = generation
        self._output = generation.outputs[0]
        self._is_stored = body.store
        self._is_cancelled = False
        self._ended = asyncio.Event()
        self._failure: TandemError | None = None
        self._sequence_number = 0
        reasoning = body.reasoning
        summary = (reasoning.summary or reasoning.generate_summary) if reasoning is not None else None
        key, tenant = context.key, context.tenant
        self._items = OutputItems(
            context.table,
            service.pieces,
            shows_summary=summary not in (None, "none"),
            seal=(lambda text: seal(key, tenant, "reasoning", text))
            if "reasoning.encrypted_content" in body.include
            else None,
            has_logprobs=self._output.submit.sampling.num_logprobs is not None,
        )
        self.response_id = new_id("resp")
        self._response = _head(service, body, self.response_id) | {
            "temperature": self._output.submit.sampling.temperature,
            "top_p": self._output.submit.sampling.top_p,
        }

    # ------------------------------------------------------------ for state.py

    def stored(self) -> Stored:
        return Stored(self._snapshot(), self._context.new_items)

    def cancel(self) -> None:
        self._is_cancelled = True
        self._generation.abandon()

    async def wait_ended(self) -> None:
        await self._ended.wait()

    async def save(self, *, is_running: bool) -> None:
        if self._is_stored:
            await self._service.responses.store.put(self.tenant, self.stored(), is_running=is_running)

    async def work(self, events: EventLog) -> None:
        try:
            async for lot in self._steps():
                for content in lot:
                    events.append(event_bytes(content))
        except TandemError as error:  # it could not be stored
            events.append(self.error_event(error))
        finally:
            self._generation.close()
            events.close()

    # ------------------------------------------------------------ for answer.py

    async def whole(self) -> bytes:
        async for _ in self._steps(shows_failed_calls=False):
            pass
        if self._failure is not None:
            raise self._failure
        return _json(self._snapshot())

    async def events(self) -> AsyncIterator[bytes]:
        async for lot in self._steps():
            yield b"".join(event_bytes(content) for content in lot)

    def error_event(self, error: TandemError) -> bytes:
        """Only for what went wrong outside of the steps, which tell of their errors themselves."""
        content = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
        return event_bytes(self._numbered(content))

    # ------------------------------------------------------------ the steps

    async def _steps(self, *, shows_failed_calls: bool = True) -> AsyncIterator[list[Json]]:
        """Events in lots, from response.created to the terminal one. The response is stored before that is told.

        Raises:
            ClientGone: the client left. A response that another request cancels ends like any other.
            TandemError: the response could not be stored.
        """
        responses = self._service.responses
        responses.begin(self)
        try:
            opening = ["response.created", "response.in_progress"]
            if self._response["status"] == "queued":
                opening.insert(1, "response.queued")
            for kind in opening:
                if kind == "response.in_progress":
                    self._response["status"] = "in_progress"
                yield [self._numbered(self._lifecycle(kind))]
            pending: list[TokenText] = []
            try:
                async for deltas in self._generation.deltas(QUIET_S):
                    events = [] if deltas else [self._lifecycle("response.in_progress")]
                    for delta in deltas:
                        events += self._show(delta, pending)
                    if events:
                        yield [self._numbered(content) for content in events]
                status = "incomplete" if self._output.finish_reason == "length" else "completed"
                events = self._items.close("completed" if status == "completed" else "incomplete")
                if not shows_failed_calls:
                    self._items.items = self._items.without_failed_calls()
                self._finish(status)
            except TandemError as error:
                events = self._items.close("incomplete")
                if isinstance(error, ClientGone):
                    self._finish("cancelled")
                else:
                    self._failure = error
                    self._finish("failed", {"code": _code(error), "message": error.message})
            await self._set_usage()
            await self.save(is_running=False)
            self._end()
            status = self._response["status"]
            if status == "cancelled" and not self._is_cancelled:
                raise ClientGone("the client closed the connection")
            last = self._lifecycle(f"response.{'incomplete' if status == 'cancelled' else status}")
            yield [self._numbered(content) for content in (*events, last)]
        finally:
            if self._response["status"] == "in_progress":  # the reader went away in the middle
                self._finish("cancelled")
            self._end()

    def _end(self) -> None:
        self._service.responses.end(self)
        self._ended.set()

    def _show(self, delta: Delta, pending: list[TokenText]) -> list[Json]:
        pending += delta.tokens
        events = []
        for item in delta.events or ([Text(delta.text)] if delta.text else []):
            tokens = take_tokens(pending, item.text, self._service.pieces) if isinstance(item, Text) else []
            events += self._items.show(item, tokens)
        return events

    def _numbered(self, content: Json) -> Json:
        content["sequence_number"] = self._sequence_number
        self._sequence_number += 1
        return content

    def _lifecycle(self, kind: str) -> Json:
        return {"type": kind, "response": self._snapshot()}

    def _snapshot(self) -> Json:
        ended = [item for item in self._items.items if item["status"] != "in_progress"]
        return {**self._response, "output": ended}

    def _finish(self, status: str, error: Json | None = None) -> None:
        now = time.time()
        self._response["status"] = status
        self._response["error"] = error
        if status == "completed":
            self._response["completed_at"] = int(now)
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}

    async def _set_usage(self) -> None:
        output = self._output
        reasoning = "".join(self._items.reasoning_texts)
        num_reasoning = (
            len(await self._service.encode(reasoning, add_special_tokens=False, param="output")) if reasoning else 0
        )
        num_prompt = len(output.submit.prompt_token_ids)
        self._response["usage"] = {
            "input_tokens": num_prompt,
            "input_tokens_details": {
                "cached_tokens": output.timings.num_cached_tokens if output.timings is not None else 0,
                "cache_write_tokens": 0,  # writing to the cache costs nothing here, so nothing is counted
            },
            "output_tokens": output.num_tokens,
            "output_tokens_details": {"reasoning_tokens": min(num_reasoning, output.num_tokens)},
            "total_tokens": num_prompt + output.num_tokens,
        }
        self._response["timings"] = timings(self._generation)


def _code(error: TandemError) -> str:
    """Codes that clients know: Codex compacts its conversation, or tries again, by them."""
    if isinstance(error, ContextLength | Busy):
        return error.code
    return "server_is_overloaded" if isinstance(error, Unavailable) else "server_error"


def _head(service: Service, body: ResponsesBody, response_id: str) -> Json:
    """A response before anything is known of its output: what was asked for."""
    reasoning = body.reasoning
    text = msgspec.to_builtins(body.text.format) if body.text and body.text.format else {"type": "text"}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if body.background else "in_progress",
        "background": body.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": service.shown_name(body.model),
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary or reasoning.generate_summary if reasoning is not None else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store,
        "text": {"format": text, "verbosity": "medium"},
        "tool_choice": msgspec.to_builtins(body.tool_choice),
        "tools": msgspec.to_builtins(body.tools or []),
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation,
        "usage": None,
        "user": body.user,
    }
