"""A scheduler that a test scripts: the ROUTER that a real frontend talks to, with a thread of its own.

Hellos, heartbeats and status are answered by themselves; what a Submit gets is up to `on_submit` or to the test, which
waits for messages with `wait_for` and answers with `send_output`. Nothing here sleeps to synchronise.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import zmq

from shared import wire
from shared.errors import BadMessage
from shared.messages import (
    CacheReply,
    CacheRequest,
    Cancel,
    EngineStatus,
    FinishReason,
    FrontendToScheduler,
    Heartbeat,
    Hello,
    Message,
    MetricsPage,
    MetricsRequest,
    Output,
    Outputs,
    RequestId,
    SayHello,
    Submit,
    Timings,
    TokenLogprob,
    Verified,
    Welcome,
    WorkerInfo,
    WorkerState,
)

SomeMessage = TypeVar("SomeMessage", bound=Message)

WAIT_S = 10.0


def worker_info(
    *, vocab_size: int = 49152, max_model_len: int = 2048, eos_token_ids: Sequence[int] = (2,)
) -> WorkerInfo:
    return WorkerInfo(
        model="fake",
        architecture="fake",
        fingerprint="fp_fake",
        device="cpu",
        dtype="float32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        num_slots=8,
        kv_capacity_tokens=8 * max_model_len,
        capacity_classes=[max_model_len],
        kv_bytes_per_token=1,
        max_step_tokens=512,
        eos_token_ids=list(eos_token_ids),
    )


def timings(*, num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int = 0) -> Timings:
    return Timings(
        queue_s=0.001,
        prefill_s=0.01,
        decode_s=0.02,
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=num_cached_tokens,
        num_output_tokens=num_output_tokens,
        num_draft_tokens=4,
        num_accepted_tokens=3,
    )


def says(
    token_ids: Sequence[int], *, finish_reason: FinishReason = "stop", chunk: int = 1
) -> Callable[[FakeEngine, Submit], None]:
    """An `on_submit` that emits `token_ids`, `chunk` at a time, then ends. Resumes after tokens already emitted."""

    def answer(engine: FakeEngine, submit: Submit) -> None:
        rest = list(token_ids[len(submit.output_token_ids) : submit.max_tokens])
        is_cut = len(token_ids) > submit.max_tokens
        lots = [rest[i : i + chunk] for i in range(0, len(rest), chunk)] or [[]]
        for lot in lots[:-1]:
            engine.send_output(submit.request_id, lot)
        engine.send_output(submit.request_id, lots[-1], finish_reason="length" if is_cut else finish_reason)

    return answer


class FakeEngine:
    """Use as a context manager, or start() and stop(). Methods may be called from any thread."""

    def __init__(self, endpoint: str, *, info: WorkerInfo | None = None, target: WorkerState = "ready") -> None:
        self.endpoint = endpoint
        self.info = info or worker_info()
        self.target: WorkerState = target
        self.scheduler_id = ""
        self.received: list[Message] = []
        self.on_submit: Callable[[FakeEngine, Submit], None] | None = None
        self.cache_reply: CacheReply | None = None
        self.metrics_page: bytes | None = b"# HELP vllm:x x\n# TYPE vllm:x gauge\nvllm:x 1.0\n"
        self.confirms_cancels = True
        self.error: BaseException | None = None
        self._submits: dict[RequestId, Submit] = {}
        self._num_sent: dict[RequestId, int] = {}
        self._peers: dict[bytes, str] = {}  # socket identity -> instance id
        self._changed = threading.Condition()
        self._outbox: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------ life

    def start(self) -> FakeEngine:
        """Bind and serve under a new scheduler id."""
        self.scheduler_id = uuid.uuid4().hex
        self._peers.clear()
        self._outbox = queue.SimpleQueue()
        self._context = zmq.Context()
        self._wake_name = f"inproc://{self.scheduler_id}"
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._router.bind(self.endpoint)
        self._wake_in = self._context.socket(zmq.PULL)
        self._wake_in.bind(self._wake_name)
        self._wake_lock = threading.Lock()
        self._wake_out = self._context.socket(zmq.PUSH)
        self._wake_out.connect(self._wake_name)
        self._thread = threading.Thread(target=self._run, name="fake engine", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Disappear without a word, as a killed process does."""
        if self._thread is None:
            return
        self._post(None)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "fake engine did not stop"
        self._thread = None
        self._wake_out.close(linger=0)
        self._context.term()

    def restart(self) -> None:
        """A new scheduler that knows nothing of the old one's requests."""
        self.stop()
        with self._changed:
            self._submits.clear()
            self._num_sent.clear()
        self.start()

    def __enter__(self) -> FakeEngine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.error is not None:
            raise self.error

    # ------------------------------------------------------------ for tests

    def wait_for(
        self,
        kind: type[SomeMessage],
        matches: Callable[[SomeMessage], bool] = lambda _: True,
        *,
        count: int = 1,
        timeout_s: float = WAIT_S,
    ) -> list[SomeMessage]:
        """The first `count` received messages of this kind; waits until there are so many."""

        def found() -> list[SomeMessage]:
            return [m for m in self.received if isinstance(m, kind) and matches(m)]

        with self._changed:
            if not self._changed.wait_for(lambda: len(found()) >= count or self.error is not None, timeout_s):
                seen = [type(m).__name__ for m in self.received if not isinstance(m, Heartbeat)]
                raise AssertionError(f"expected {count} {kind.__name__}, saw {seen}")
            return found()[:count]

    def forget_received(self) -> None:
        with self._changed:
            self.received.clear()

    def send(self, message: Message) -> None:
        """To every frontend that said hello."""
        self.send_raw(wire.encode(message))

    def send_raw(self, *frames: bytes) -> None:
        for identity in list(self._peers):
            self._post([identity, *frames])

    def send_output(
        self,
        request_id: RequestId,
        token_ids: Sequence[int],
        *,
        finish_reason: FinishReason | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        error: str | None = None,
        num_cached_tokens: int = 0,
        verified: Verified | None = None,
        is_repeated: bool = False,
    ) -> None:
        with self._changed:
            submit = self._submits[request_id]
            self._num_sent[request_id] += len(token_ids)
            num_sent = self._num_sent[request_id]
            if finish_reason is not None:
                del self._submits[request_id]
        output = Output(
            request_id=request_id,
            token_ids=list(token_ids),
            logprobs=list(logprobs) if logprobs is not None else None,
            finish_reason=finish_reason,
            error=error,
            verified=verified,
            is_repeated=is_repeated,
            timings=None
            if finish_reason is None
            else timings(
                num_prompt_tokens=len(submit.prompt_token_ids),
                num_output_tokens=num_sent,
                num_cached_tokens=num_cached_tokens,
            ),
        )
        self.send(Outputs(outputs=[output]))

    def set_target(self, state: WorkerState) -> None:
        self.target = state
        self.send(self._status())

    # ------------------------------------------------------------ the thread

    def _post(self, frames: list[bytes] | None) -> None:
        self._outbox.put(frames)
        with self._wake_lock:
            self._wake_out.send(b"")

    def _status(self) -> EngineStatus:
        return EngineStatus(
            scheduler_id=self.scheduler_id,
            target=self.target,
            drafter="absent",
            target_info=self.info if self.target == "ready" else None,
        )

    def _run(self) -> None:
        decoder = wire.Decoder(FrontendToScheduler)
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake_in, zmq.POLLIN)
        next_beat = 0.0
        try:
            while True:
                events = dict(poller.poll(100))
                if self._wake_in in events:
                    self._wake_in.recv()
                    frames = self._outbox.get_nowait()
                    if frames is None:
                        return
                    self._router.send_multipart(frames)
                if self._router in events:
                    identity, *body = self._router.recv_multipart()
                    try:
                        self._handle(identity, decoder.decode(body[0]))
                    except BadMessage as error:
                        raise AssertionError(f"the frontend sent a bad message: {error}") from error
                if time.monotonic() > next_beat:
                    next_beat = time.monotonic() + 0.2
                    for identity in self._peers:
                        self._router.send_multipart([identity, wire.encode(Heartbeat(instance_id=self.scheduler_id))])
                        self._router.send_multipart([identity, wire.encode(self._status())])
        except Exception as error:  # noqa: BLE001 - handed to the test, which fails with it
            self.error = error
        finally:
            with self._changed:
                self._changed.notify_all()
            self._router.close(linger=0)
            self._wake_in.close(linger=0)

    def _handle(self, identity: bytes, message: Message) -> None:
        def reply(answer: Message) -> None:
            self._router.send_multipart([identity, wire.encode(answer)])

        if isinstance(message, Hello):
            self._peers[identity] = message.instance_id
            reply(Welcome(scheduler_id=self.scheduler_id, epoch=1))
            reply(self._status())
        elif identity not in self._peers:
            reply(SayHello())
            return
        with self._changed:
            self.received.append(message)
            if isinstance(message, Submit):
                self._submits[message.request_id] = message
                self._num_sent[message.request_id] = len(message.output_token_ids)
            self._changed.notify_all()
        if isinstance(message, Submit) and self.on_submit is not None:
            self.on_submit(self, message)
        elif isinstance(message, Cancel) and message.request_id in self._submits and self.confirms_cancels:
            self.send_output(message.request_id, [], finish_reason="abort")
        elif isinstance(message, MetricsRequest) and self.metrics_page is not None:
            reply(MetricsPage(query_id=message.query_id, page=self.metrics_page))
        elif isinstance(message, CacheRequest) and self.cache_reply is not None:
            reply(msgspec.structs.replace(self.cache_reply, query_id=message.query_id))
