"""One step of an engine, timed, for scripts that need no server. Import after BLAS was preloaded."""

from __future__ import annotations

import time
from collections.abc import Sequence

from shared.messages import RequestId, SamplingParams, SequenceStart, Step, StepRow
from workers.engine import Engine

CONTEXT = 100  # tokens of each sequence before the measured step
CAPACITY = 512


def step_seconds(engine: Engine, drafts: Sequence[int], num_prompt: int, adapters: Sequence[str] = ("",)) -> float:
    """One step of fresh sequences.

    Args:
        drafts: of each decode row, behind `CONTEXT` tokens.
        num_prompt: tokens of another sequence's prompt in the same step; 0: none.
        adapters: the sequences', in turn.
    """
    slots = range(len(drafts))
    if drafts:
        starts = [_start(slot, CONTEXT, adapters) for slot in slots]
        contexts = [_row(slot, 0, CONTEXT) for slot in slots]
        engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=starts, decodes=[], prefills=contexts)))
    decodes = [_row(slot, CONTEXT, 1 + k, k) for slot, k in zip(slots, drafts, strict=True)]
    joining = [_start(len(drafts), num_prompt, adapters)] if num_prompt else []
    prefills = [_row(len(drafts), 0, num_prompt)] if num_prompt else []
    began = time.perf_counter()
    engine.finish(engine.begin(Step(epoch=0, step_id=1, starts=joining, decodes=decodes, prefills=prefills)))
    seconds = time.perf_counter() - began
    engine.reset()
    return seconds


def _start(slot: int, num_tokens: int, adapters: Sequence[str]) -> SequenceStart:
    return SequenceStart(
        slot=slot, request_id=RequestId(f"row-{slot}"), sampling=SamplingParams(temperature=0.0),
        num_prompt_tokens=num_tokens, token_ids=[1] * num_tokens, adapter=adapters[slot % len(adapters)],
    )  # fmt: skip


def _row(slot: int, first: int, num_tokens: int, num_drafts: int = 0) -> StepRow:
    return StepRow(slot=slot, start=first, capacity=CAPACITY, token_ids=[1] * num_tokens, num_drafts=num_drafts)
