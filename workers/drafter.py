"""The drafter worker process. `python -m workers.drafter`.

Without a draft model it only registers and heartbeats: it is there, so that the process tree is always the same.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from shared import config, log, served
from shared.errors import BadConfig, BadModel
from shared.messages import DraftReply, DraftRequest, Drain, ToDrafter, Welcome, WorkerInfo
from shared.supervise import EXIT_CONFIG
from workers import blas, no_torch
from workers.link import Link

if TYPE_CHECKING:
    from workers.draft_engine import DraftEngine
    from workers.features import FeatureReceiver

logger = logging.getLogger("drafter")

IDLE_POLL_S = 1.0
IDLE = WorkerInfo(
    model="none",
    architecture="none",
    fingerprint="",
    device="none",
    dtype="none",
    vocab_size=0,
    max_model_len=0,
    num_slots=0,
    kv_capacity_tokens=0,
    capacity_classes=[],
    kv_bytes_per_token=0,
    max_step_tokens=0,
    eos_token_ids=[],
)  # registered, and drafts nothing
FEATURE_WAIT_S = 0.02  # the rows of a step leave the target right after its result: they are on their way


class DrafterProcess:
    """Answers draft requests; takes features in while it waits for them."""

    def __init__(self, settings: config.Settings, load_id: int = 0) -> None:
        self.engine: DraftEngine | None = None
        self.info: WorkerInfo | None = None
        self.features: FeatureReceiver | None = None
        self.epoch = 0
        self.is_draining = False
        if not settings.draft_checkpoint:
            self.info = IDLE
            self.link = Link(settings, "drafter", ToDrafter, dict)
            self.link.start()
            return
        from workers.build_drafter import build_drafter
        from workers.features import FeatureReceiver
        from workers.machine import memory

        self.link = Link(settings, "drafter", ToDrafter, memory)
        self.link.start()
        started = time.perf_counter()
        self.engine, info = build_drafter(settings)
        self.info = msgspec.structs.replace(info, load_id=load_id)
        if self.engine.needs_features:
            self.features = FeatureReceiver(settings)
        logger.info("%s (%s) ready after %.1f s", self.info.model, self.info.draft_kind, time.perf_counter() - started)

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.is_draining = True

    def run(self) -> None:
        try:
            while not self.is_draining:
                match self.link.receive(IDLE_POLL_S if self.engine is None else 0.1):
                    case Welcome() as message:
                        self._welcome(message)
                    case DraftRequest() as message if message.epoch == self.epoch and self.engine is not None:
                        self.link.send(self._draft(message, self.engine))
                    case DraftRequest():
                        self.link.num_dropped += 1
                    case Drain():
                        self.is_draining = True
                    case None:
                        self._take_features(0.0)
        finally:
            self.link.close()

    def _welcome(self, message: Welcome) -> None:
        self.epoch = self.link.epoch = message.epoch
        if self.engine is not None:
            self.engine.reset()
        if self.info is not None:
            self.link.ready(self.info)

    def _take_features(self, timeout_s: float) -> None:
        if self.features is not None and self.engine is not None:
            before = self.features.num_dropped
            for epoch, rows, array in self.features.receive(timeout_s):
                if epoch < self.engine.target_epoch:
                    self.link.num_dropped += 1
                    continue
                self.engine.use_epoch(epoch)  # a new target's rows may come before the first request that names it
                self.engine.take_features(rows, array)
            self.link.num_dropped += self.features.num_dropped - before  # the heartbeat tells the scheduler

    def _draft(self, message: DraftRequest, engine: DraftEngine) -> DraftReply:
        started = time.perf_counter()
        engine.use_epoch(message.target_epoch)
        engine.end(message.ended)
        for row in message.rows:
            engine.take_tokens(row)
        self._take_features(0.0)
        deadline = time.perf_counter() + FEATURE_WAIT_S
        while not all(engine.is_complete(row) for row in message.rows) and time.perf_counter() < deadline:
            self._take_features(0.002)
        drafts = engine.draft(message.rows)
        seconds = time.perf_counter() - started
        return DraftReply(epoch=self.epoch, draft_id=message.draft_id, drafts=drafts, seconds=seconds)


def main() -> int:
    try:
        settings, choice = served.load_for("drafter")
        log.set_up("drafter", settings.log_level)
        config.prepare_run_folder(settings)
        if settings.draft_checkpoint:
            no_torch.leave_out()
            logger.info("%s", blas.prepare(settings))
        drafter = DrafterProcess(settings, choice.load_id)
    except BadModel as error:
        return served.refused("drafter", settings, choice, error)
    except BadConfig as error:
        print(f"drafter: {error}", file=sys.stderr)
        return EXIT_CONFIG
    signal.signal(signal.SIGTERM, drafter.stop)
    signal.signal(signal.SIGINT, drafter.stop)
    signal.signal(signal.SIGHUP, drafter.stop)
    # The model and the modules stay for good; without them a full collection takes no time, with them a step or more.
    gc.collect()
    gc.freeze()
    drafter.run()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # MLX's device threads need no orderly end
