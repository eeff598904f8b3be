"""The engine as the frontend's text side sees it, running on the event loop of this process instead of behind a socket.

Steps run on the loop itself, one between two of its rounds: readers get a step's tokens before the next one's, and on
a GPU the next step is computed meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from frontend.streams import CancelReason, TokenStream
from shared.errors import EngineFailure, TandemError, Unavailable, from_code
from shared.messages import (
    CacheReply,
    CacheRequest,
    Cancel,
    EngineStatus,
    Message,
    MetricsPage,
    MetricsRequest,
    Outputs,
    Rejected,
    RequestId,
    Submit,
    Timings,
    WorkerInfo,
)

if TYPE_CHECKING:
    from tandem.local.processes import LocalProcesses

log = logging.getLogger("tandem")

FRONTEND = "frontend"  # our instance id
TICK_S = 1.0


class LocalEngine:
    """A `frontend.engine_protocol.Engine`.

    Args:
        build: makes the processes; gets what takes their messages to the frontend.
    """

    def __init__(self, build: Callable[[Callable[[Message], None]], LocalProcesses]) -> None:
        self.status: EngineStatus | None = None
        self.num_dropped_messages = 0
        self._live: dict[RequestId, tuple[TokenStream, int]] = {}
        self._answer: CacheReply | MetricsPage | None = None
        self._failure: EngineFailure | None = None
        self._is_stopping = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.processes = build(self._take)

    # ------------------------------------------------ life

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="steps")

    def stop(self) -> None:
        self._is_stopping = True
        self._fail(Unavailable("the model was closed"))

    async def close(self) -> None:
        self.stop()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.processes.close()

    async def _run(self) -> None:
        """Steps while there are any; otherwise wait for a request."""
        next_tick = time.monotonic() + TICK_S
        try:
            while True:
                is_busy = self.processes.work()
                if time.monotonic() >= next_tick:
                    self.processes.tick()
                    next_tick = time.monotonic() + TICK_S
                if is_busy:
                    await asyncio.sleep(0)
                    continue
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), TICK_S if self._live else None)
        except Exception as error:  # of a step: out of memory, a fault of a model
            log.exception("a step failed")
            self._failure = EngineFailure(f"a step failed: {error}; load the model again")
            self._fail(self._failure)

    def _fail(self, error: TandemError) -> None:
        for stream, _ in self._live.values():
            stream.fail(error)
        self._live.clear()

    # ------------------------------------------------ state

    is_silent = False

    @property
    def is_ready(self) -> bool:
        return not self._is_stopping and self._failure is None

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def target_info(self) -> WorkerInfo | None:
        return self.status.target_info if self.status is not None else None

    def require_target(self) -> WorkerInfo:
        """Raises:
        Unavailable: the model was closed.
        EngineFailure: a step failed before.
        """
        if self._failure is not None:
            raise self._failure
        if self._is_stopping:
            raise Unavailable("the model was closed")
        assert self.status is not None and self.status.target_info is not None, "the target said that it is ready"
        return self.status.target_info

    def timings(self, request_id: RequestId) -> Timings | None:
        """Of a request that has not ended; None for one that has."""
        return None if self._is_stopping else self.processes.core.timings(request_id, time.monotonic())

    # ------------------------------------------------ requests

    def open(self, submits: Sequence[Submit]) -> TokenStream:
        self.require_target()
        stream = TokenStream(len(submits))
        for index, submit in enumerate(submits):
            self._live[submit.request_id] = (stream, index)
        for submit in submits:
            self.processes.send(FRONTEND, submit)
        self._wake.set()
        return stream

    def cancel(self, request_id: RequestId, reason: CancelReason) -> None:
        if request_id in self._live:
            self.processes.send(FRONTEND, Cancel(request_id=request_id, reason=reason))
            self._wake.set()

    def forget(self, request_id: RequestId, reason: CancelReason = "client_gone") -> None:
        if self._live.pop(request_id, None) is not None:
            self.processes.send(FRONTEND, Cancel(request_id=request_id, reason=reason))
            self._wake.set()

    def fail_all(self, error: TandemError) -> None:
        for request_id in self._live:
            self.processes.send(FRONTEND, Cancel(request_id=request_id, reason="shutdown"))
        self._fail(error)
        self._wake.set()

    @property
    def peak_memory_bytes(self) -> int:
        return self.processes.peak_memory_bytes

    async def metrics_page(self, timeout_s: float = 1.0) -> bytes | None:
        self.processes.send(FRONTEND, MetricsRequest(query_id=0))
        return self._answer.page if isinstance(self._answer, MetricsPage) else None

    async def prefix_cache(self, clear: bool, timeout_s: float = 5.0) -> CacheReply | None:
        self.processes.send(FRONTEND, CacheRequest(query_id=0, clear=clear))
        self._wake.set()
        return self._answer if isinstance(self._answer, CacheReply) else None

    # ------------------------------------------------ what the scheduler sends

    def _take(self, message: Message) -> None:
        match message:
            case Outputs():
                for output in message.outputs:
                    place = self._live.get(output.request_id)
                    if place is None:
                        continue  # forgotten
                    if output.finish_reason is not None:
                        del self._live[output.request_id]
                    place[0].put(place[1], output)
            case Rejected():
                place = self._live.pop(message.request_id, None)
                if place is not None:
                    place[0].fail(from_code(message.code, message.message, message.retry_after_s))
            case EngineStatus():
                self.status = message
            case CacheReply() | MetricsPage():
                self._answer = message
            case _:
                pass  # greetings and heartbeats
