"""The target worker process: loads the model, runs steps. `python -m workers.target`."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from shared import config, log, served
from shared.errors import BadConfig, BadModel, TandemError
from shared.messages import (
    BlocksArchived,
    ClearArchive,
    Drain,
    LoadBlocks,
    Release,
    Shrink,
    Step,
    StepResult,
    ToTarget,
    Welcome,
    WorkerFailed,
    WorkerInfo,
)
from shared.model_files import resolve
from shared.supervise import EXIT_CONFIG
from workers import blas, no_torch

if TYPE_CHECKING:
    from workers.archiver import Archiver
    from workers.engine import PendingStep

logger = logging.getLogger("target")

IDLE_POLL_S = 1.0
ARCHIVE_POLL_S = 0.002  # while idle and blocks go to or come from the archive
# Without a step for so long, the device is idle. Between two steps of a busy server there is often none, too, and then
# copying a block would hold up the next one.
IDLE_AFTER_S = 0.05
MAX_LOOK_AHEAD_S = 0.02  # longest wait for the next step while one runs
WEIGHT = 0.2  # of a step in moving averages


class Target:
    """Owns the engine. On a GPU one step runs while the next is being queued."""

    def __init__(self, settings: config.Settings, load_id: int = 0) -> None:
        from workers.build import build_archiver, build_engine
        from workers.features import FeatureSender
        from workers.link import Link
        from workers.machine import is_cpu, memory

        self.settings = settings
        self.link = Link(settings, "target", ToTarget, memory)
        self.link.start()  # heartbeats begin before the weights are read
        started = time.perf_counter()
        self.engine, info = build_engine(resolve(settings.model, settings), settings)
        # MLX's CPU device runs a graph while it is being queued, so a second step would only delay the first's result.
        self.depth = 1 if is_cpu() else 2
        self.info = msgspec.structs.replace(info, load_id=load_id, queues_steps=self.depth > 1)
        logger.info(
            "%s ready on %s in %s after %.1f s: %d slots, %d tokens of KV",
            self.info.model, self.info.device, self.info.dtype, time.perf_counter() - started, self.info.num_slots,
            self.info.kv_capacity_tokens,
        )  # fmt: skip
        self.archiver = build_archiver(self.engine, self.info, settings)
        self.sender = FeatureSender(settings) if self.engine.model.captures else None
        self.step_s = 0.0  # moving average of the time that a step is waited for
        self.build_s = 0.0  # of the time that making one ready takes
        self.is_queued = False  # the step that was begun last was begun behind another
        self.last_busy = 0.0  # `time.monotonic` when the last step ended
        self.epoch = 0
        self.scheduler_id = ""
        self.last_step = self.last_release = self.last_load = 0  # ids of the last messages taken in this epoch
        self.is_draining = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.is_draining = True

    def run(self) -> None:
        """Until told to stop. An exception of a step is fatal: the supervisor starts a clean process."""
        waiting: deque[Step | Release] = deque()  # in order of arrival
        running: deque[PendingStep] = deque()
        try:
            while not self.is_draining:
                message = self.link.receive(
                    self._patience(len(waiting), len(running)), is_idle=not waiting and not running
                )
                match message:
                    case Welcome():
                        if self._is_repeated(message):
                            self.link.num_dropped += 1
                            continue
                        self._welcome(message)
                        waiting.clear()
                        running.clear()
                    case Step() | Release() if message.epoch == self.epoch:
                        if not self._is_next(message):
                            continue
                        waiting.append(message)
                        if len(waiting) + len(running) <= self.depth:
                            continue  # look for more before waiting for the device
                    case LoadBlocks() if message.epoch == self.epoch and self.archiver is not None:
                        if self._is_next(message):
                            _keep_loading(message, waiting)
                            self.archiver.load(message)
                    case ClearArchive() if message.epoch == self.epoch and self.archiver is not None:
                        self.archiver.clear()
                    case Step() | Release() | LoadBlocks() | ClearArchive():
                        self.link.num_dropped += 1
                    case Drain():
                        self.is_draining = True
                num_running = len(running)
                while waiting and len(running) < self.depth:
                    self._begin(waiting.popleft(), running)
                if num_running < len(running) < self.depth and not self.is_draining:
                    continue  # the next one may have come meanwhile; else this one would be alone, and all after it
                is_busy = bool(running or waiting)
                if running:
                    self._finish(running.popleft())
                self.engine.keep_blocks()
                now = time.monotonic()
                if is_busy:
                    self.last_busy = now
                if self.archiver is not None:
                    self._archive(self.archiver, is_idle=now - self.last_busy > IDLE_AFTER_S)
        except Exception as error:
            logger.exception("a step failed")
            self.link.send(WorkerFailed(epoch=self.epoch, reason=str(error)[:500]))
            raise
        finally:
            if self.sender is not None:
                self.sender.close()
            if self.archiver is not None:
                self.archiver.close()
            self.link.close()

    def _is_repeated(self, message: Welcome) -> bool:
        return message.scheduler_id == self.scheduler_id and message.epoch <= self.epoch

    def _is_next(self, message: Step | Release | LoadBlocks) -> bool:
        """Whether a message continues where the last one ended. A gap begins a new epoch: what is here may be wrong."""
        if isinstance(message, Step):
            is_repeated = message.step_id <= self.last_step
            is_next = message.step_id == self.last_step + 1 and message.after_release == self.last_release
        elif isinstance(message, Release):
            is_repeated = message.release_id <= self.last_release
            is_next = message.release_id == self.last_release + 1 and message.after_step == self.last_step
        else:
            is_repeated = message.load_id <= self.last_load
            is_next = message.load_id == self.last_load + 1 and message.after_step <= self.last_step
        if is_next and not is_repeated:
            match message:
                case Step():
                    self.last_step = message.step_id
                case Release():
                    self.last_release = message.release_id
                case LoadBlocks():
                    self.last_load = message.load_id
            return True
        self.link.num_dropped += 1
        if not is_repeated:
            logger.warning("messages were lost on their way; saying hello again")
            self.epoch = self.link.epoch = 0  # until the answer: what else comes of the old epoch is of no use
            self.link.hello()
            self.last_step = self.last_release = self.last_load = 0
        return False

    def _patience(self, num_waiting: int, num_running: int) -> float:
        """Seconds to wait for a message.

        While a step runs on a GPU the scheduler plans the one after. Behind a step that was queued another is to be
        expected: as long as making one ready takes it is waited for, since results that are read before it is begun
        would leave the device and the scheduler idle in turn, step after step. Behind one that came alone, as with
        drafts, half the time until the device is done lets it arrive and delays no result.
        """
        if num_waiting + num_running == 0:
            if self.archiver is not None and (self.archiver.is_loading or self.archiver.has_work):
                return ARCHIVE_POLL_S
            return IDLE_POLL_S
        if num_waiting == 0 and num_running < self.depth:
            return min(self.build_s if self.is_queued else self.step_s / 2, MAX_LOOK_AHEAD_S)
        return 0.0

    def _begin(self, message: Step | Release, running: deque[PendingStep]) -> None:
        if isinstance(message, Release):
            self.engine.release(message.slots, message.stores)
            if message.shrink is not None:
                self._shrink(message.shrink)
        else:
            self.is_queued = bool(running)
            running.append(self.engine.begin(message))
            self.build_s = _averaged(self.build_s, running[-1].build_s)
        if self.archiver is not None and message.stores:
            self.archiver.stored(message.stores)

    def _shrink(self, shrink: Shrink) -> None:
        if self.archiver is not None:
            self.archiver.shrink()
        self.engine.shrink(shrink.kept_blocks, shrink.free_states)

    def _archive(self, archiver: Archiver, is_idle: bool) -> None:
        """A little of the work between the device pool and the archive."""
        while (loaded := archiver.loaded()) is not None:
            if loaded.epoch == self.epoch:
                self.link.send(loaded)
        archiver.copy_some(is_idle)
        if (news := archiver.news(self.epoch)) is not None:
            self.link.send(news)

    def _finish(self, step: PendingStep) -> None:
        result = self.engine.finish(step)
        self.link.send(result)
        self._send_features(step, result)
        self.step_s = _averaged(self.step_s, result.phases["device"])

    def _send_features(self, done: PendingStep, result: StepResult) -> None:
        """After the result, so that the scheduler plans meanwhile."""
        features = self.engine.feature_rows(done, result) if self.sender is not None else None
        if features is not None and self.sender is not None:
            rows, bits = features
            self.sender.send(self.epoch, rows, bits, "float32" if bits.dtype == np.float32 else self.info.dtype)
            self.link.num_feature_bytes = self.sender.num_bytes

    def _welcome(self, greeting: Welcome) -> None:
        """A (new) scheduler: it knows of no sequence here."""
        self.epoch, self.scheduler_id, self.last_step = greeting.epoch, greeting.scheduler_id, 0
        self.link.epoch = greeting.epoch
        self.last_release = self.last_load = 0
        self.engine.reset()
        archived: list[BlocksArchived] = []
        if self.archiver is not None:
            self.archiver.reset()
            archived = self.archiver.everything(self.epoch)
        self.link.ready(_with_archive(self.info, sum(len(message.added) for message in archived)))
        for message in archived:
            self.link.send(message)


def _averaged(mean: float, value: float) -> float:
    return mean + WEIGHT * (value - mean)


def _with_archive(info: WorkerInfo, num_archived: int) -> WorkerInfo:
    """So that the scheduler lets requests wait for the list instead of computing what it will name."""
    if info.prefix_cache is None:
        return info
    cache = msgspec.structs.replace(info.prefix_cache, num_archived=num_archived)
    return msgspec.structs.replace(info, prefix_cache=cache)


def _keep_loading(message: LoadBlocks, waiting: Iterable[Step | Release]) -> None:
    """Blocks are loaded as soon as they can be, so a Shrink that was sent before may be done after that."""
    for earlier in waiting:
        if isinstance(earlier, Release) and earlier.shrink is not None:
            earlier.shrink.kept_blocks.extend(message.block_ids)
            taken = set(message.states.values())
            earlier.shrink.free_states[:] = [i for i in earlier.shrink.free_states if i not in taken]


def main() -> int:
    try:
        settings, choice = served.load_for("target")
        log.set_up("target", settings.log_level)
        config.prepare_run_folder(settings)
        no_torch.leave_out()
        logger.info("%s", blas.prepare(settings))
        target = Target(settings, choice.load_id)
    except BadModel as error:
        return served.refused("target", settings, choice, error)
    except BadConfig as error:
        print(f"target: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except TandemError as error:
        print(f"target: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, target.stop)
    signal.signal(signal.SIGINT, target.stop)
    signal.signal(signal.SIGHUP, target.stop)
    # The model and the modules stay for good; without them a full collection takes no time, with them a step or more.
    gc.collect()
    gc.freeze()
    target.run()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # MLX's device threads need no orderly end, and may take seconds for one
