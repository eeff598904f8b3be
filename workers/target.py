"""The target worker process: loads the model, runs steps. `python -m workers.target`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections import deque
from types import FrameType
from typing import TYPE_CHECKING

from shared import config, log
from shared.errors import BadConfig, BadModel, TandemError
from shared.messages import Drain, Ready, Release, Step, StepResult, ToTarget, Welcome, WorkerFailed
from shared.model_files import resolve
from shared.supervise import EXIT_CONFIG
from workers import blas

if TYPE_CHECKING:
    from workers.engine import PendingStep

logger = logging.getLogger("target")

IDLE_POLL_S = 1.0
MAX_LOOK_AHEAD_S = 0.02  # longest wait for the next step while one runs


class Target:
    """Owns the engine; one step runs on the device while the next is being queued."""

    def __init__(self, settings: config.Settings) -> None:
        from workers.build import build_engine
        from workers.features import FeatureSender
        from workers.link import Link
        from workers.machine import memory

        self.settings = settings
        self.link = Link(settings, "target", ToTarget, memory)
        self.link.start()  # heartbeats begin before the weights are read
        started = time.perf_counter()
        self.engine, self.info = build_engine(resolve(settings.model, settings), settings)
        logger.info(
            "%s ready on %s in %s after %.1f s: %d slots, %d tokens of KV",
            self.info.model, self.info.device, self.info.dtype, time.perf_counter() - started, self.info.num_slots,
            self.info.kv_capacity_tokens,
        )  # fmt: skip
        self.sender = FeatureSender(settings) if self.engine.model.captures else None
        self.epoch = 0
        self.is_draining = False

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        self.is_draining = True

    def run(self) -> None:
        """Until told to stop. An exception of a step is fatal: the supervisor starts a clean process."""
        pending: deque[PendingStep] = deque()
        step_s = 0.0  # moving average of the time a step keeps the device
        try:
            while not self.is_draining:
                # While a step runs, the scheduler plans the one after: give it time to arrive, so that it is queued
                # before the device falls idle. Half a step's time never delays a result.
                wait_s = IDLE_POLL_S if not pending else min(step_s / 2, MAX_LOOK_AHEAD_S) if len(pending) < 2 else 0.0
                message = self.link.receive(wait_s)
                match message:
                    case Welcome():
                        self._welcome(message)
                        pending.clear()
                    case Step() if message.epoch == self.epoch:
                        pending.append(self.engine.begin(message))
                        if len(pending) < 2:
                            continue  # look for the next one before waiting for this one
                    case Release() if message.epoch == self.epoch:
                        self.engine.release(message.slots)
                        continue
                    case Drain():
                        self.is_draining = True
                    case Step() | Release():
                        self.link.num_dropped += 1
                        continue
                if pending:
                    done = pending.popleft()
                    result = self.engine.finish(done)
                    self.link.send(result)
                    self._send_features(done, result)
                    step_s = 0.8 * step_s + 0.2 * result.phases["device"]
        except Exception as error:
            logger.exception("a step failed")
            self.link.send(WorkerFailed(epoch=self.epoch, reason=str(error)[:500]))
            raise
        finally:
            if self.sender is not None:
                self.sender.close()
            self.link.close()

    def _send_features(self, done: PendingStep, result: StepResult) -> None:
        """After the result, so that the scheduler plans meanwhile."""
        from workers.features import to_numpy

        features = self.engine.feature_rows(done, result) if self.sender is not None else None
        if features is not None and self.sender is not None:
            self.sender.send(features[0], *to_numpy(features[1]))

    def _welcome(self, message: Welcome) -> None:
        """A (new) scheduler: it knows of no sequence here."""
        self.epoch = message.epoch
        self.engine.reset()
        self.link.send(Ready(epoch=self.epoch, info=self.info))


def main() -> int:
    try:
        settings = config.load()
        log.set_up("target", settings.log_level)
        config.prepare_run_folder(settings)
        logger.info("%s", blas.preload(settings))
        target = Target(settings)
    except (BadConfig, BadModel) as error:
        print(f"target: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except TandemError as error:
        print(f"target: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, target.stop)
    signal.signal(signal.SIGINT, target.stop)
    target.run()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # MLX's device threads need no orderly end, and may take seconds for one


