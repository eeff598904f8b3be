"""Scheduler core, target and drafter in one thread: messages are handed over as objects, in the order of a socket's.

What the processes' shells do with time is done here too, in the way that gives the same tokens: on a GPU one step runs
while the next is being queued, and the features of a step reach the drafter before its next request does.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

from scheduler.core import Core
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from shared.config import Settings
from shared.messages import (
    DraftReply,
    DraftRequest,
    Heartbeat,
    Hello,
    LoadBlocks,
    Message,
    Ready,
    Release,
    Role,
    Step,
    StepResult,
    Welcome,
    WorkerInfo,
)
from tandem.local.engine import FRONTEND
from workers.draft_engine import DraftEngine
from workers.engine import Engine, PendingStep
from workers.machine import free_cached_memory, is_cpu, memory, peak_memory_bytes

TARGET, DRAFTER = "target", "drafter"  # instance ids


class LocalProcesses:
    """Everything here belongs to the thread that built the engines: MLX's streams are a thread's own.

    Args:
        on_message: called with what the scheduler sends to the frontend.
    """

    def __init__(
        self,
        settings: Settings,
        target: tuple[Engine, WorkerInfo],
        drafter: tuple[DraftEngine, WorkerInfo] | None,
        on_message: Callable[[Message], None],
    ) -> None:
        self.engine, info = target
        self.drafter = drafter[0] if drafter is not None else None
        self.core = Core(settings, Metrics(info.model))
        self._on_message = on_message
        self._epochs: dict[str, int] = {}
        self._queue: deque[Step | Release] = deque()
        self._running: deque[PendingStep] = deque()
        self._depth = 1 if is_cpu() else 2  # as workers/target.py says
        self._join(FRONTEND, "frontend")
        self._join(TARGET, "target", info)
        if drafter is not None:
            self._join(DRAFTER, "drafter", drafter[1])

    def _join(self, instance_id: str, role: Role, info: WorkerInfo | None = None) -> None:
        self.send(instance_id, Hello(role=role, instance_id=instance_id, pid=os.getpid()))
        if info is not None:
            self.send(instance_id, Ready(epoch=self._epochs[instance_id], info=info))

    # ------------------------------------------------ messages

    def send(self, sender: str, message: Message) -> None:
        """Hand a message to the core, and its answers to whom they are for."""
        self._deliver(self.core.handle(sender, message, time.monotonic()))

    def tick(self) -> None:
        """Now and then: limits of time. Nobody is lost here, so everybody is heard first."""
        for instance_id in self._epochs:
            own = memory() if instance_id == TARGET else {}
            self.send(instance_id, Heartbeat(instance_id=instance_id, memory_bytes=own))
        self._deliver(self.core.tick(time.monotonic()))

    def close(self) -> None:
        """Let go of the models. Nothing else may be called afterwards."""
        self._queue.clear()
        self._running.clear()
        del self.engine, self.drafter
        free_cached_memory()

    def _deliver(self, envelopes: list[Envelope]) -> None:
        requests: list[DraftRequest] = []
        for receiver, message in envelopes:
            match message:
                case Welcome():
                    self._epochs[receiver] = message.epoch
                case Step() | Release():
                    self._queue.append(message)
                case DraftRequest():
                    requests.append(message)
                case LoadBlocks():
                    raise AssertionError("blocks of an archive, which there is none of")
                case _ if receiver == FRONTEND:
                    self._on_message(message)
        for request in requests:
            self.send(DRAFTER, self._draft(request))

    # ------------------------------------------------ work

    @property
    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes()

    def work(self) -> bool:
        """Finish one step, with the next one queued before where the device allows it. False: there is none."""
        while self._queue and len(self._running) < self._depth:
            message = self._queue.popleft()
            if isinstance(message, Release):
                self.engine.release(message.slots, message.stores)
            else:
                self._running.append(self.engine.begin(message))
        if not self._running:
            return False
        pending = self._running.popleft()
        result = self.engine.finish(pending)
        self._take_features(pending, result)
        self.send(TARGET, result)
        return True

    def _take_features(self, pending: PendingStep, result: StepResult) -> None:
        features = self.engine.feature_rows(pending, result) if self.engine.model.captures else None
        if features is None or self.drafter is None:
            return
        rows, bits = features
        at = 0
        for row in rows:
            self.drafter.take_features(row, bits[at : at + row.num_rows])
            at += row.num_rows

    def _draft(self, request: DraftRequest) -> DraftReply:
        assert self.drafter is not None, "drafts without a drafter"
        started = time.perf_counter()
        self.drafter.use_epoch(request.target_epoch)
        self.drafter.end(request.ended)
        for row in request.rows:
            self.drafter.take_tokens(row)
        drafts = self.drafter.draft(request.rows)
        seconds = time.perf_counter() - started
        return DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=seconds)
