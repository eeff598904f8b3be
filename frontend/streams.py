"""Outputs on their way from the socket to one HTTP response."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

import msgspec

from shared.errors import TandemError
from shared.messages import Output, Submit

CancelReason = Literal["client_gone", "stop_string", "timeout", "shutdown"]

# A request that nothing is heard of is submitted again, in case a message was lost: a scheduler that has it goes on.
FIRST_RESUBMIT_S = 10.0


MAX_UNREAD = 4096  # outputs of one request that may wait for its client, beside what the sockets hold


class ClientGone(TandemError):
    """The client closed its connection; nobody reads the answer."""

    code = "client_gone"


class TokenStream:
    """The outputs of the sequences of one HTTP request, in order of arrival. One reader."""

    def __init__(self, num_sequences: int, slow_reader_s: float = 60.0) -> None:
        self.num_sequences = num_sequences
        self.error: TandemError | None = None
        self.on_slow_reader: Callable[[], None] | None = None
        self._slow_reader_s = slow_reader_s
        self._arrived: list[tuple[int, Output]] = []
        self._oldest = 0.0  # when the first of these came
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, output: Output) -> None:
        now = asyncio.get_running_loop().time()
        if not self._arrived:
            self._oldest = now
        elif self.on_slow_reader is not None and (
            len(self._arrived) >= MAX_UNREAD or now - self._oldest > self._slow_reader_s
        ):
            # The writer waits for a client whose buffers are full. Cutting the connection ends the request as if the
            # client had left.
            self.on_slow_reader()
            self.on_slow_reader = None
        self._arrived.append((index, output))
        self._wake()

    def fail(self, error: TandemError) -> None:
        """End the stream: the reader gets what has arrived, then `error`."""
        if self.error is None:
            self.error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self, timeout_s: float | None = None) -> list[tuple[int, Output]]:
        """All (sequence index, output) pairs that have arrived, at least one; empty after `timeout_s`.

        Raises:
            TandemError: a sequence was rejected or failed, the client left, or the engine was lost.
        """
        if not self._arrived and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            if timeout_s is None:
                await self._waiter
            else:
                await asyncio.wait([self._waiter], timeout=timeout_s)
            self._waiter = None
        if self._arrived:
            arrived, self._arrived = self._arrived, []
            return arrived
        if self.error is not None:
            raise self.error
        return []


class LiveRequest:
    """One accepted Submit that has not ended, with all it takes to submit it again."""

    __slots__ = ("deadline", "index", "is_sent", "output_token_ids", "resubmit_at", "resubmit_s", "stream", "submit")

    def __init__(self, submit: Submit, index: int, stream: TokenStream) -> None:
        self.submit = submit
        self.index = index
        self.stream = stream
        self.output_token_ids: list[int] = list(submit.output_token_ids)
        self.is_sent = False
        self.deadline: float | None = None  # of the whole request, whichever scheduler has it
        self.resubmit_at = float("inf")  # when it is asked for again if nothing comes
        self.resubmit_s = FIRST_RESUBMIT_S

    def heard(self, now: float) -> None:
        self.resubmit_s = FIRST_RESUBMIT_S
        self.resubmit_at = now + FIRST_RESUBMIT_S

    def is_due(self, now: float) -> bool:
        """Whether to ask again; the next time only after twice as long."""
        if now < self.resubmit_at:
            return False
        self.resubmit_s *= 2
        self.resubmit_at = now + self.resubmit_s
        return True


def without_repeated(output: Output, num_repeated: int) -> Output | None:
    """An Output without its first tokens, which came before; None where nothing new is left."""
    logprobs = output.logprobs[num_repeated:] if output.logprobs is not None else None
    verified = output.verified
    if verified is not None:
        num_accepted = max(0, verified.num_accepted - num_repeated)
        verified = msgspec.structs.replace(verified, num_accepted=num_accepted)
    token_ids = output.token_ids[num_repeated:]
    if not token_ids and output.finish_reason is None:
        return None
    return msgspec.structs.replace(output, token_ids=token_ids, logprobs=logprobs, verified=verified)
