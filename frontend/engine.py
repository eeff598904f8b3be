"""The scheduler as the frontend sees it: one DEALER socket, live requests, and what is known of the engine's state.

Everything here runs on one event loop. The socket is read by a plain reader callback instead of `zmq.asyncio`: that
saves a future and a poll for every message, which is the frontend's hot path.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from typing import assert_never

import msgspec
import psutil
import zmq

from frontend.streams import CancelReason, LiveRequest, TokenStream, without_repeated
from shared import wire
from shared.beat import Beat
from shared.config import Settings
from shared.errors import BadMessage, TandemError, Unavailable, from_code
from shared.messages import (
    CacheReply,
    CacheRequest,
    Cancel,
    Drain,
    EngineStatus,
    Heartbeat,
    Hello,
    Message,
    MetricsPage,
    MetricsRequest,
    Output,
    Outputs,
    Rejected,
    RequestId,
    SayHello,
    Submit,
    ToFrontend,
    Welcome,
    WorkerInfo,
)
from shared.sockets import secure

log = logging.getLogger("frontend")

RETRY_AFTER_S = 2.0  # what a client is told while the engine starts or restarts
HELLO_INTERVAL_S = 0.2  # while the scheduler is silent: a restarted one is found this fast
MAX_MESSAGES_PER_WAKE = 64  # then the loop gets to write to clients before more is read
LINGER_MS = 200


class EngineClient:
    """Submits requests, routes their Outputs and keeps them alive over a restart of the scheduler.

    Args:
        lost_limit_s: how long live requests wait for a silent scheduler, on top of `heartbeat_timeout_s`.
    """

    def __init__(self, settings: Settings, *, lost_limit_s: float = 60.0) -> None:
        self._settings = settings
        self._lost_limit_s = lost_limit_s
        self._instance_id = uuid.uuid4().hex
        self._decoder = wire.Decoder(ToFrontend)
        self._live: dict[RequestId, LiveRequest] = {}
        self._answers: dict[int, asyncio.Future[MetricsPage | CacheReply]] = {}
        self._num_queries = 0
        self._scheduler_id: str | None = None
        self._is_forgotten = False  # the scheduler said it does not know us, so it holds none of our requests
        self._is_stopping = False
        self._is_draining = False
        self._last_heard = float("-inf")
        self._beat = Beat(settings, "frontend")
        self._process = psutil.Process()
        self.status: EngineStatus | None = None
        self.num_dropped_messages = 0

    # ------------------------------------------------------------ life

    async def start(self) -> None:
        """Connect and begin to say hello; does not wait for the scheduler."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.time()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._instance_id.encode())  # how the scheduler addresses us
        # No high-water mark: Outputs lost to one could not be asked for again. What can queue is bounded by the tokens
        # of live requests, and no new ones are taken while the scheduler is silent.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # Frames for a scheduler that is gone must not wait for the next one: it gets live requests by resubmission.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_HEADER_BYTES)
        secure(self._socket, self._settings, self._settings.engine_endpoint, is_server=False)
        self._socket.connect(self._settings.engine_endpoint)
        self._loop.add_reader(self._socket.fileno(), self._read)
        self._ticker = asyncio.create_task(self._tick_forever(), name="engine heartbeat")

    def stop(self) -> None:
        """Cancel every live request; new ones are refused from now on."""
        self._is_stopping = True
        self.fail_all(Unavailable("the server is shutting down", retry_after_s=RETRY_AFTER_S))

    def fail_all(self, error: TandemError) -> None:
        """End every live request with this error."""
        for live in list(self._live.values()):
            self._send(Cancel(request_id=live.submit.request_id, reason="shutdown"))
            self._fail(live, error)

    async def close(self) -> None:
        self.stop()
        self._ticker.cancel()
        await asyncio.gather(self._ticker, return_exceptions=True)
        self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        await asyncio.to_thread(self._context.term)  # bounded by LINGER_MS

    # ------------------------------------------------------------ state

    @property
    def is_silent(self) -> bool:
        return self._loop.time() - self._last_heard > self._settings.heartbeat_timeout_s

    @property
    def is_ready(self) -> bool:
        """Whether a request submitted now would reach a target that is ready."""
        return not self.is_silent and not self._is_stopping and not self._is_draining and self._target() == "ready"

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def target_info(self) -> WorkerInfo | None:
        """The last known target; kept while it restarts."""
        return self.status.target_info if self.status is not None else None

    def _target(self) -> str:
        return self.status.target if self.status is not None else "absent"

    def require_target(self) -> WorkerInfo:
        """The ready target.

        Raises:
            Unavailable: there is none; says why and when to try again.
        """
        if self._is_stopping or self._is_draining:
            raise Unavailable("the server is shutting down", retry_after_s=RETRY_AFTER_S)
        if self.status is None or self.is_silent:
            raise Unavailable("the scheduler does not answer", retry_after_s=RETRY_AFTER_S)
        if self.status.target != "ready" or self.status.target_info is None:
            raise Unavailable(f"the target model is {self.status.target}, not ready", retry_after_s=RETRY_AFTER_S)
        return self.status.target_info

    # ------------------------------------------------------------ requests

    def open(self, submits: Sequence[Submit]) -> TokenStream:
        """Start these sequences; their outputs come on the returned stream, labelled by their place in `submits`.

        Raises:
            Unavailable: no target is ready.
        """
        self.require_target()
        stream = TokenStream(len(submits), self._settings.slow_reader_s)
        for index, submit in enumerate(submits):
            live = LiveRequest(submit, index, stream)
            now = self._loop.time()
            live.heard(now)
            live.deadline = now + submit.timeout_s if submit.timeout_s is not None else None
            self._live[submit.request_id] = live
            live.is_sent = self._send(submit)
        return stream

    def cancel(self, request_id: RequestId, reason: CancelReason) -> None:
        """Tell the scheduler to stop this request; its terminal Output still reaches the stream."""
        if request_id in self._live:
            self._send(Cancel(request_id=request_id, reason=reason))

    def forget(self, request_id: RequestId, reason: CancelReason = "client_gone") -> None:
        """Stop this request and drop whatever still comes for it. A request that has ended is left alone."""
        if self._live.pop(request_id, None) is not None:
            self._send(Cancel(request_id=request_id, reason=reason))

    async def metrics_page(self, timeout_s: float = 1.0) -> bytes | None:
        """The engine's Prometheus page, or None when the scheduler does not answer in time."""
        answer = await self._ask(lambda query_id: MetricsRequest(query_id=query_id), timeout_s)
        return answer.page if isinstance(answer, MetricsPage) else None

    async def prefix_cache(self, clear: bool, timeout_s: float = 5.0) -> CacheReply | None:
        """State of the prefix cache, emptied before with `clear`; None when the scheduler does not answer in time."""
        answer = await self._ask(lambda query_id: CacheRequest(query_id=query_id, clear=clear), timeout_s)
        return answer if isinstance(answer, CacheReply) else None

    async def _ask(
        self, request: Callable[[int], MetricsRequest | CacheRequest], timeout_s: float
    ) -> MetricsPage | CacheReply | None:
        self._num_queries += 1
        query_id = self._num_queries
        future = self._answers[query_id] = self._loop.create_future()
        try:
            if not self._send(request(query_id)):
                return None
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return None
        finally:
            del self._answers[query_id]

    # ------------------------------------------------------------ socket

    def _send(self, message: Message) -> bool:
        """False when no scheduler is connected; then resubmission or the next tick repeats what matters."""
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        # The socket's descriptor is edge-triggered and sending consumes the edge, so look for input ourselves.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._loop.call_soon(self._read)
        return True

    def _read(self) -> None:
        """Handle what has arrived, at most MAX_MESSAGES_PER_WAKE messages of it."""
        if self._socket.closed:
            return
        for _ in range(MAX_MESSAGES_PER_WAKE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise BadMessage(f"{len(frames)} frames, expected one")
                self._handle(self._decoder.decode(frames[0]))
            except BadMessage as error:
                self.num_dropped_messages += 1
                log.debug("dropped a message: %s", error)
        self._loop.call_soon(self._read)

    def _handle(
        self,
        message: Welcome | Heartbeat | SayHello | Outputs | Rejected | EngineStatus | MetricsPage | CacheReply | Drain,
    ) -> None:
        self._last_heard = self._loop.time()
        match message:
            case Outputs():
                for output in message.outputs:
                    self._route(output)
            case Rejected():
                live = self._live.get(message.request_id)
                if live is not None:
                    self._fail(live, from_code(message.code, message.message, message.retry_after_s))
            case EngineStatus():
                self._update_status(message)
            case Welcome():
                self._welcome(message)
            case SayHello():
                self._is_forgotten = True
                self._hello()
            case MetricsPage() | CacheReply():
                future = self._answers.get(message.query_id)
                if future is not None and not future.done():
                    future.set_result(message)
            case Drain():
                self._is_draining = True
            case Heartbeat():
                pass
            case _:
                assert_never(message)

    def _route(self, output: Output) -> None:
        live = self._live.get(output.request_id)
        if live is None:  # forgotten: the client is gone, and this was on its way
            if output.finish_reason is None:
                self._send(Cancel(request_id=output.request_id, reason="client_gone"))
            return
        if output.start is not None and output.start != len(live.output_token_ids):
            self.num_dropped_messages += 1
            if output.start > len(live.output_token_ids):
                live.is_sent = False  # the next tick submits it again, which brings what is missing
                return
            repeated = without_repeated(output, len(live.output_token_ids) - output.start)
            if repeated is None:
                return
            output = repeated
        live.output_token_ids.extend(output.token_ids)
        live.heard(self._last_heard)
        if output.finish_reason is not None:
            del self._live[output.request_id]
        live.stream.put(live.index, output)

    def _fail(self, live: LiveRequest, error: TandemError) -> None:
        self._live.pop(live.submit.request_id, None)
        live.stream.fail(error)

    def _update_status(self, status: EngineStatus) -> None:
        if status.scheduler_id != self._scheduler_id:
            self.num_dropped_messages += 1  # from a scheduler that we have not met (or that is gone)
            return
        if self.status is None or (status.target, status.drafter) != (self.status.target, self.status.drafter):
            log.info("engine: target %s, drafter %s", status.target, status.drafter)
        if status.target == "ready" and self._target() != "ready" and status.target_info is not None:
            self._announce(status.target_info)
        if status.target_info is None and self.status is not None:
            status = msgspec.structs.replace(status, target_info=self.status.target_info)
        self.status = status

    def _announce(self, info: WorkerInfo) -> None:
        """The line that a person waits for after starting the server."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        drafter = self._settings.draft_checkpoint or ("n-gram" if self._settings.is_ngram else "none")
        what = (
            f"model {info.model}, {info.dtype} on {info.device}, context {info.max_model_len}, {info.num_slots} slots, "
            f"drafter {drafter}"
        )
        page = f"\nChat page: http://{host}:{self._settings.port}/ui" if self._settings.ui else ""
        print(f"Tandem is ready on http://{host}:{self._settings.port} ({what}){page}", flush=True)

    def _welcome(self, welcome: Welcome) -> None:
        is_new = welcome.scheduler_id != self._scheduler_id
        if is_new:
            log.info("connected to scheduler %s", welcome.scheduler_id[:8])
            if self.status is not None:  # the new one's own status follows
                self.status = msgspec.structs.replace(
                    self.status, scheduler_id=welcome.scheduler_id, target="absent", drafter="absent"
                )
        self._scheduler_id = welcome.scheduler_id
        if is_new or self._is_forgotten:
            self._is_forgotten = False
            for live in list(self._live.values()):
                self._resubmit(live)

    def _resubmit(self, live: LiveRequest) -> None:
        """Send a live request again with the tokens so far, so that its stream goes on where it stopped."""
        if live.stream.error is not None:
            return
        left_s = None if live.deadline is None else max(0.0, live.deadline - self._loop.time())
        resumed = msgspec.structs.replace(
            live.submit, output_token_ids=list(live.output_token_ids), is_resumed=True, timeout_s=left_s
        )
        live.is_sent = self._send(resumed)

    # ------------------------------------------------------------ time

    def _hello(self) -> None:
        self._send(Hello(role="frontend", instance_id=self._instance_id, pid=os.getpid()))

    async def _tick_forever(self) -> None:
        interval = self._settings.heartbeat_interval_s
        while True:
            self._read()  # after a suspended machine wakes up, what has arrived counts before silence does
            silence = self._loop.time() - max(self._last_heard, self._started)
            is_met = self._scheduler_id is not None and silence <= 2 * interval
            if is_met:
                self._send(
                    Heartbeat(
                        instance_id=self._instance_id,
                        num_dropped_messages=self.num_dropped_messages,
                        memory_bytes={"resident": self._process.memory_info().rss},
                    ),
                )
                now = self._loop.time()
                for live in [live for live in self._live.values() if not live.is_sent or live.is_due(now)]:
                    self._resubmit(live)
            else:
                self._hello()
            if silence > self._settings.heartbeat_timeout_s + self._lost_limit_s:
                for live in list(self._live.values()):
                    self._fail(live, Unavailable(f"the engine was lost and did not come back in {silence:.0f} s"))
            self._beat.touch()
            await asyncio.sleep(interval if is_met else min(interval, HELLO_INTERVAL_S))
