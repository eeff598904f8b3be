"""One HTTP request's sequences from Submit to the last character: tokens in, text and finish reasons out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec
from starlette.requests import Request

from frontend.caller import Caller
from frontend.connection import ABORT
from frontend.origins import DraftCounts, TokenOrigin, origins_of
from frontend.output_events import Event, Text, joined_text
from frontend.output_parser import OutputParser
from frontend.output_parser import Request as ParserRequest
from frontend.sampling import check_token_ids, for_sequences, output_limit
from frontend.schemas import GenerationBody
from frontend.service import Service
from frontend.stop import StopMatcher
from frontend.streams import ClientGone, TokenStream
from frontend.tracing import SequenceSpan
from shared.errors import EngineFailure, InvalidRequest, TandemError, from_code
from shared.messages import (
    FinishReason,
    Grammar,
    MediaItem,
    Output,
    RequestId,
    Submit,
    Thinking,
    Timings,
    TokenLogprob,
)

# After a stop string the engine is asked to stop; its terminal Output brings the timings and comes within a step.
STOP_WAIT_S = 1.0


class TokenText(msgspec.Struct, frozen=True):
    """One output token with its log-probabilities. `offset` counts the output's characters before it."""

    token_id: int
    logprob: TokenLogprob
    offset: int


class Delta(msgspec.Struct):
    """What one Output adds to one sequence, ready to be shown. `events` replaces `text` where it is not all text."""

    index: int
    text: str
    events: Sequence[Event] = ()
    token_ids: Sequence[int] = ()
    tokens: Sequence[TokenText] = ()  # only where log-probabilities were asked for
    origins: Sequence[TokenOrigin] = ()  # only where they were asked for
    finish_reason: FinishReason | None = None


class OutputText:
    """The text side of one sequence: detokenizing, stop strings, parsing, log-probabilities, counts."""

    def __init__(
        self, service: Service, submit: Submit, index: int, body: GenerationBody, parsing: ParserRequest | None
    ) -> None:
        self.submit = submit
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.timings: Timings | None = None
        self.span: SequenceSpan | None = None  # with tracing, once it was submitted
        self.stop_deadline: float | None = None  # set once a stop string was found, until the engine has answered
        self._stop_token_ids = frozenset(submit.stop_token_ids)
        self._parser = OutputParser(parsing) if parsing is not None and not parsing.is_plain else None
        self._detokenizer = service.detokenizer(
            skip_special_tokens=body.skip_special_tokens,
            is_text_start=parsing is not None,
            markers=parsing.markers if parsing is not None else frozenset(),
        )
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self._matcher = StopMatcher(stops) if stops else None
        self._num_chars = 0
        self.returns_origins = body.return_token_origins
        self.draft_counts = DraftCounts()

    @property
    def num_calls(self) -> int:
        """Complete tool calls so far."""
        return self._parser.num_calls if self._parser is not None else 0

    @property
    def stop_string(self) -> str | None:
        """The one that ended this sequence."""
        return self._matcher.matched if self._matcher is not None else None

    def feed(self, output: Output) -> Delta:
        """Advance by one Output.

        Raises:
            EngineFailure: the engine could not finish this sequence.
        """
        num_before = self.num_tokens
        delta = self._parsed(self._read(output))
        delta.token_ids = output.token_ids[: self.num_tokens - num_before]  # none after a stop string
        return delta

    def _parsed(self, delta: Delta) -> Delta:
        if self._parser is None:
            return delta
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.close()
        elif self._parser.is_done and self.stop_deadline is None:  # the one call that was wanted: the rest is of no use
            self.stop_deadline = asyncio.get_running_loop().time() + STOP_WAIT_S
        if all(isinstance(event, Text) for event in events):
            delta.text = joined_text(events)
        else:
            delta.text, delta.events = "", events
        return delta

    def _read(self, output: Output) -> Delta:
        if self.stop_deadline is not None:  # text after the stop string is not shown
            return Delta(
                self.index, "", finish_reason=self._end("stop", output.timings) if output.finish_reason else None
            )
        token_ids = output.token_ids
        ended_by_token = output.finish_reason == "stop" and token_ids and token_ids[-1] in self._stop_token_ids
        shown = token_ids[:-1] if ended_by_token else token_ids
        delta = Delta(self.index, "")
        if self._matcher is None and output.logprobs is None and not self.returns_origins:
            self.num_tokens += len(token_ids)
            delta.text = self._detokenizer.feed(shown)
        else:
            self._feed_singly(output, len(shown), delta)
        if self.stop_deadline is not None:
            delta.finish_reason = self._end("stop", output.timings) if output.finish_reason else None
            return delta
        if output.finish_reason is None:
            return delta
        if output.finish_reason in ("error", "abort"):
            text = output.error or "the engine ended this request before it was complete"
            raise from_code(output.error_code or EngineFailure.code, text)
        delta.text += self._rest()
        delta.finish_reason = self._end(output.finish_reason, output.timings)
        return delta

    def _feed_singly(self, output: Output, num_shown: int, delta: Delta) -> None:
        """Token by token, so that each has its offset and origin and none is counted after a stop string."""
        text = ""
        tokens: list[TokenText] = []
        origins: list[TokenOrigin] = []
        origin_of = origins_of(output) if self.returns_origins else ()
        self.draft_counts.add(output)
        for place, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            if output.logprobs is not None:
                tokens.append(TokenText(token_id, output.logprobs[place], self._num_chars))
            piece = self._detokenizer.feed((token_id,)) if place < num_shown else ""
            if origin_of:
                origins.append(TokenOrigin(piece, origin_of[place]))
            if place >= num_shown:
                break
            self._num_chars += len(piece)
            if self._matcher is None:
                text += piece
                continue
            text += self._matcher.feed(piece)
            if self._matcher.matched is not None:
                self.stop_deadline = asyncio.get_running_loop().time() + STOP_WAIT_S
                break
        delta.text, delta.tokens, delta.origins = text, tokens, origins

    def _rest(self) -> str:
        """Text that was waiting for a character's or a stop string's end."""
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text
        return self._matcher.feed(text) + self._matcher.flush()

    def _end(self, reason: FinishReason, timings: Timings | None) -> FinishReason:
        self.finish_reason = reason
        self.timings = timings
        self.stop_deadline = None
        if self.span is not None:
            self.span.end(reason, self.num_tokens, timings)
        return reason

    def give_up_waiting(self) -> Delta:
        """The engine did not confirm a stop in time: end without timings."""
        return self._parsed(Delta(self.index, "", finish_reason=self._end("stop", None)))


class Generation:
    """The running sequences of one HTTP request. Sequence i of prompt p has index p * n + i."""

    def __init__(self, service: Service, outputs: list[OutputText], n: int) -> None:
        self.outputs = outputs
        self.n = n
        self._engine = service.engine
        self._tracing, self._model_name = service.tracing, service.model_name
        self._stream: TokenStream | None = None
        self._num_open = len(outputs)
        self._held: list[Delta] = []
        self._error: TandemError | None = None

    def start(self) -> None:
        """Raises Unavailable when no target is ready."""
        if self._tracing is not None:
            for output in self.outputs:
                name = output.submit.adapter or self._model_name
                output.span = self._tracing.sequence(output.submit, name)
        try:
            self._stream = self._engine.open([output.submit for output in self.outputs])
        except TandemError:
            self._end_spans()
            raise

    def disconnect_slow_reader(self, abort: Callable[[], None] | None) -> None:
        """Args:
        abort: cuts the connection; called when the client does not read what waits for it.
        """
        assert self._stream is not None, "started"
        self._stream.on_slow_reader = abort

    def abandon(self) -> None:
        """The client is gone: stop the engine's work now, wherever the reader is."""
        assert self._stream is not None, "started"
        self.close()
        self._stream.fail(ClientGone("the client closed the connection"))

    def close(self) -> None:
        """Cancel what has not ended; nothing is left to do after a complete answer."""
        for output in self.outputs:
            if output.finish_reason is None:
                self._engine.forget(output.submit.request_id)
        self._end_spans()

    def _end_spans(self) -> None:
        """Of sequences that did not end by themselves."""
        for output in self.outputs:
            if output.span is not None:
                output.span.leave()

    async def wait_accepted(self, timeout_s: float) -> None:
        """Wait a little for the first outputs, so that a refusal still gets its own HTTP status.

        Raises:
            TandemError: the engine refused the request, or failed.
        """
        self._held = await self._next(timeout_s)

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[list[Delta]]:
        """What has arrived, in lots, until every sequence has ended. An empty lot: nothing came for `idle_s`.

        Raises:
            TandemError: the engine failed, or the client left (ClientGone).
        """
        if self._held:
            yield self._held
            self._held = []
        while self._num_open:
            yield await self._next(idle_s)

    async def _next(self, timeout_s: float | None = None) -> list[Delta]:
        assert self._stream is not None, "started"
        deadlines = [output.stop_deadline for output in self.outputs if output.stop_deadline is not None]
        now = asyncio.get_running_loop().time() if deadlines else 0.0
        if deadlines:
            timeout_s = max(0.0, min(deadlines) - now)
        deltas: list[Delta] = []
        try:
            if self._error is not None:
                raise self._error
            arrived = await self._stream.get(timeout_s)
            for index, output in arrived:
                deltas.append(self._feed(index, output))
        except Exception as error:
            self.close()  # one sequence failed: the answer is an error, so the others are of no use
            if not deltas or not isinstance(error, TandemError):
                raise
            self._error = error  # raised next time, after the text that came before it
        if deadlines and not arrived:
            for text in self.outputs:
                if text.stop_deadline is not None and text.stop_deadline <= now + (timeout_s or 0.0):
                    deltas.append(text.give_up_waiting())
                    self._engine.forget(text.submit.request_id, "stop_string")
        self._num_open -= sum(delta.finish_reason is not None for delta in deltas)
        return deltas

    def _feed(self, index: int, output: Output) -> Delta:
        text = self.outputs[index]
        was_running = text.stop_deadline is None
        delta = text.feed(output)
        if was_running and text.stop_deadline is not None:
            self._engine.cancel(text.submit.request_id, "stop_string")
        return delta


def prepare(
    service: Service,
    caller: Caller,
    body: GenerationBody,
    prompts: Sequence[list[int]],
    *,
    max_tokens: int | None,
    max_tokens_param: str,
    num_logprobs: int | None,
    parsing: ParserRequest | None = None,
    grammar: Grammar | None = None,
    thinking: Thinking | None = None,
    media: Sequence[MediaItem] = (),
) -> Generation:
    """Check a request against the model and build its sequences.

    Args:
        parsing: None where outputs go on with the prompt's text instead of being turns of their own.
        media: of the one prompt.

    Raises:
        InvalidRequest: a token id, length or limit does not fit the model.
        Unavailable: no target is ready, so its limits are not known.
    """
    target = service.engine.require_target()
    sampling = for_sequences(body, service.text.sampling_defaults, target.vocab_size, num_logprobs)
    if grammar is not None:
        _check_with_grammar(body)
    stop_token_ids = list(body.stop_token_ids or [])
    check_token_ids(stop_token_ids, target.vocab_size, "stop_token_ids")
    if not body.ignore_eos:
        stop_token_ids += [*service.text.eos_token_ids, *target.eos_token_ids]
    base = uuid.uuid4().hex
    outputs: list[OutputText] = []
    for prompt in prompts:
        limit = output_limit(max_tokens, len(prompt), target.max_model_len, max_tokens_param)
        if body.min_tokens > limit:
            raise InvalidRequest(f"min_tokens: {body.min_tokens} is more than the limit of {limit}", param="min_tokens")
        for params in sampling:
            index = len(outputs)
            submit = Submit(
                request_id=RequestId(f"{base}-{index}"),
                prompt_token_ids=prompt,
                sampling=params,
                max_tokens=limit,
                stop_token_ids=sorted(set(stop_token_ids)),
                min_tokens=body.min_tokens,
                grammar=grammar,
                thinking=thinking,
                priority=body.priority,
                tenant=caller.tenant,
                timeout_s=caller.timeout_s,
                cache_salt=caller.cache_salt,
                media=list(media),
                adapter=service.adapter_of(body.model),
            )
            outputs.append(OutputText(service, submit, index, body, parsing))
    return Generation(service, outputs, body.n)


def _check_with_grammar(body: GenerationBody) -> None:
    """A grammar says where the output ends; these two ask for more."""
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise InvalidRequest(f"{name}: an output with a grammar ends where the grammar does", param=name)


class Watched(Protocol):
    """What goes on for a client: a generation, or the reading of one that runs in the background."""

    def abandon(self) -> None:
        """The client is gone."""

    def disconnect_slow_reader(self, abort: Callable[[], None] | None) -> None:
        """`abort` cuts the connection of a client that does not read what waits for it."""

    def close(self) -> None:
        """The answer has ended."""


class ClientWatcher:
    """Ends a generation at once when its client closes the connection, be it queued, streaming or not.

    It lives from the submission to the end of the answer, which for a stream is after the endpoint has returned.
    """

    def __init__(self, request: Request, generation: Watched) -> None:
        self._request = request
        self._generation = generation
        generation.disconnect_slow_reader(request.scope.get(ABORT))
        self._task = asyncio.create_task(self._watch(), name="client watcher")

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._generation.abandon()

    def close(self) -> None:
        """Stop watching; whatever has not ended is cancelled."""
        self._task.cancel()
        self._generation.close()
