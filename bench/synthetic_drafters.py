"""What stands in for a drafter and its acceptance in `bench.synthetic`.

Drafts come after a wait or from a Gemma 4 assistant with random weights; a coin says how many are accepted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import mlx.core as mx
import msgspec
from mlx.utils import tree_flatten

from bench.model_shapes import write_assistant
from shared.config import Settings
from shared.messages import Draft, DraftReply, DraftRequest, StepResult, WorkerInfo
from workers.build_drafter import build_drafter, draft_config, install_fusion
from workers.drafters.assistant import AssistantDrafter
from workers.engine import Engine, PendingStep
from workers.load import LoadedModel
from workers.machine import DTYPES
from workers.sampling.uniform import uniform

MAX_K = 7


class Drafter(Protocol):
    """A drafter process as the loop sees it. All its calls are measured."""

    name: str
    num_parameters: int

    def info(self, target: WorkerInfo) -> WorkerInfo:
        """What it tells the scheduler once it is ready."""

    def reset(self) -> None:
        """A new scheduler, which knows of no sequence yet."""

    def features(self, pending: PendingStep, result: StepResult) -> None:
        """Take over what the target has for it after a step."""

    def draft(self, request: DraftRequest) -> DraftReply: ...


class WaitDrafter:
    """Drafts of no sense after a busy wait of `draft_s`, as another process on the same machine would take."""

    name, num_parameters = "wait", 0

    def __init__(self, draft_s: float) -> None:
        self._draft_s = draft_s

    def info(self, target: WorkerInfo) -> WorkerInfo:
        return msgspec.structs.replace(target, draft_kind="synthetic", max_draft_tokens=MAX_K)

    def reset(self) -> None: ...

    def features(self, pending: PendingStep, result: StepResult) -> None: ...

    def draft(self, request: DraftRequest) -> DraftReply:
        until = time.perf_counter() + self._draft_s
        drafts = [
            Draft(request_id=r.request_id, anchor=r.start + len(r.token_ids) - 1, token_ids=[11] * r.num_tokens)
            for r in request.rows
        ]
        while time.perf_counter() < until:
            pass
        return DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=0.0)


class RandomAssistant:
    """The drafter process of a Gemma 4 assistant without its sockets: rows pass through the host as there.

    From now on the target keeps the rows that the assistant reads: plain decoding is measured before.

    Args:
        shape: of `ASSISTANTS`; `loaded` and `engine` are its target.
    """

    name = "assistant"

    def __init__(self, shape: str, loaded: LoadedModel, engine: Engine) -> None:
        self._target = engine
        with TemporaryDirectory() as folder:
            write_assistant(Path(folder), shape, loaded.dtype)
            settings = Settings(draft_model=folder, draft_block_size=MAX_K)
            install_fusion(engine.model, draft_config(settings, loaded.config), DTYPES[loaded.dtype])
            self._engine, self._info = build_drafter(settings, loaded)
        drafter = self._engine.drafter
        assert isinstance(drafter, AssistantDrafter), "the checkpoint of an assistant"
        arrays = [array for _, array in tree_flatten(drafter.model.parameters())]
        self.num_parameters = sum(a.size for a in arrays if mx.issubdtype(a.dtype, mx.floating))

    def info(self, target: WorkerInfo) -> WorkerInfo:
        return self._info

    def reset(self) -> None:
        self._engine.reset()

    def features(self, pending: PendingStep, result: StepResult) -> None:
        found = self._target.feature_rows(pending, result)
        if found is None:
            return
        self._engine.use_epoch(pending.step.epoch)
        at = 0
        for rows in found[0]:
            self._engine.take_features(rows, found[1][at : at + rows.num_rows])
            at += rows.num_rows

    def draft(self, request: DraftRequest) -> DraftReply:
        started = time.perf_counter()
        self._engine.use_epoch(request.target_epoch)
        self._engine.end(request.ended)
        for row in request.rows:
            self._engine.take_tokens(row)
        drafts = self._engine.draft(request.rows)
        seconds = time.perf_counter() - started
        return DraftReply(epoch=request.epoch, draft_id=request.draft_id, drafts=drafts, seconds=seconds)


class Coin:
    """Accepts each drafted token with the given chance; the same draws in every arm."""

    def __init__(self, chance: float) -> None:
        self.chance = chance
        self.num_rows = 0

    def count(self, draft_token_ids: Sequence[int], target_token_ids: Sequence[int]) -> int:
        """How many of a row's drafts are accepted; stands in for `workers.accept.count_accepted`."""
        drafts = draft_token_ids
        self.num_rows += 1
        n = 0
        while n < len(drafts) and uniform(self.num_rows, n) < self.chance:
            n += 1
        return n
