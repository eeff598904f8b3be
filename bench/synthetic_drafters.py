"""What stands in for a drafter and its acceptance in `bench.synthetic`.

Drafts come after a wait; a coin says how many are accepted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from shared.messages import Draft, DraftReply, DraftRequest, StepResult, WorkerInfo
from workers.engine import PendingStep
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
