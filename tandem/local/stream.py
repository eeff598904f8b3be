"""The outputs of one call on their way from the model's thread to the caller's."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Self

from frontend.generation import Delta, Generation, OutputText, TokenText
from frontend.output_events import Call, CallArguments, CallEnd, CallFailed, CallStart, Reasoning, Text, settle
from frontend.service import Service
from shared.messages import Timings
from tandem.local.engine import LocalEngine
from tandem.local.loop import LoopThread
from tandem.results import Piece, Stats, Token, ToolCall


class PieceStream:
    """Pieces of all outputs in the order in which they come. Closing it (or leaving its `with`) stops the rest.

    `stats` are the counters of each output so far, also after an interrupt.
    """

    def __init__(
        self, loop: LoopThread, service: Service, engine: LocalEngine, generations: Sequence[Generation]
    ) -> None:
        self.stats: list[Stats] = [Stats() for _ in generations]
        self._loop = loop
        self._service = service
        self._engine = engine
        self._generations = generations
        self._arrived: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._work: Future[None] = loop.start(self._run())
        self._is_done = False

    async def _run(self) -> None:
        """On the model's thread: read every output; the first error ends all."""
        try:
            async with asyncio.TaskGroup() as group:
                for index, generation in enumerate(self._generations):
                    group.create_task(self._read(index, generation))
        except ExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            for generation in self._generations:
                generation.close()
            self._arrived.put(None)

    async def _read(self, index: int, generation: Generation) -> None:
        output = generation.outputs[0]
        calls = _Calls()
        num_tokens = 0
        async for deltas in generation.deltas():
            for delta in deltas:
                num_tokens += len(delta.token_ids)
                self._arrived.put(self._piece(index, output, delta, calls, num_tokens))

    def _piece(self, index: int, output: OutputText, delta: Delta, calls: _Calls, num_tokens: int) -> Piece:
        events = delta.events or [Text(delta.text)]
        reason: str | None = delta.finish_reason
        timings = output.timings or self._engine.timings(output.submit.request_id)
        return Piece(
            index=index,
            text="".join(e.text if isinstance(e, Text) else e.raw for e in events if isinstance(e, Text | CallFailed)),
            reasoning="".join(event.text for event in events if isinstance(event, Reasoning)),
            token_ids=list(delta.token_ids),
            tokens=[self._token(token) for token in delta.tokens],
            tool_calls=calls.completed(delta),
            finish_reason="tool_calls" if reason == "stop" and output.num_calls else reason,
            stats=_stats(output, timings, num_tokens, self._engine.peak_memory_bytes),
        )

    def _token(self, token: TokenText) -> Token:
        return Token(
            token_id=token.token_id,
            text=self._service.pieces.bytes_of(token.token_id).decode("utf-8", "replace"),
            logprob=token.logprob.logprob,
            top=[(top.token_id, top.logprob) for top in token.logprob.top],
        )

    # ------------------------------------------------ for the caller

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        """Raises TandemError: the engine could not finish an output."""
        piece = None if self._is_done else self._arrived.get()
        if piece is None:
            self._is_done = True
            with contextlib.suppress(CancelledError):
                self._work.result()
            raise StopIteration
        self.stats[piece.index] = piece.stats
        return piece

    def close(self) -> None:
        """Stop what still runs; its slots are free within a step."""
        self._is_done = True
        self._work.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        work = self.__dict__.get("_work")  # not there where the loop was closed meanwhile
        if work is not None:
            work.cancel()


class _Calls:
    """Collects the parts of tool calls until they are complete."""

    def __init__(self) -> None:
        self._events: dict[int, list[Any]] = {}

    def completed(self, delta: Delta) -> list[ToolCall]:
        found: list[ToolCall] = []
        for event in delta.events:
            match event:
                case CallStart() | CallArguments():
                    self._events.setdefault(event.index, []).append(event)
                case CallFailed():
                    del self._events[event.index]
                case CallEnd():
                    for call in settle(self._events.pop(event.index)):
                        assert isinstance(call, Call), "made of a call's events"
                        found.append(ToolCall(call_id=call.call_id, name=call.name, arguments=call.arguments))
        return found


def _stats(output: OutputText, timings: Timings | None, num_tokens: int, peak_memory_bytes: int) -> Stats:
    known = timings or Timings(
        queue_s=0.0, prefill_s=0.0, decode_s=0.0, num_prompt_tokens=len(output.submit.prompt_token_ids),
        num_cached_tokens=0, num_output_tokens=0,
    )  # fmt: skip
    return Stats(
        num_prompt_tokens=known.num_prompt_tokens,
        num_cached_tokens=known.num_cached_tokens,
        num_output_tokens=num_tokens,
        num_drafts=known.num_drafts,
        num_draft_tokens=known.num_draft_tokens,
        num_accepted_tokens=known.num_accepted_tokens,
        queue_s=known.queue_s,
        prefill_s=known.prefill_s,
        decode_s=known.decode_s,
        peak_memory_bytes=peak_memory_bytes,
    )
