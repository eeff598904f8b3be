"""Measures at start what steps cost, by batch and width, so that the speculation policy need not guess.

Figures are kept in the cache folder by model, dtype and device: a second start takes none of this time.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import msgspec

from shared.messages import RequestId, SamplingParams, SequenceStart, Step, StepCost, StepRow, WorkerInfo
from workers.engine import Engine
from workers.machine import is_cpu

logger = logging.getLogger("target")

GPU_BATCHES = (1, 2, 4, 8, 16, 32)
CPU_BATCHES = (1, 4)  # each step takes its time there; the policy follows the rest online
WIDTHS = (1, 2, 4, 8)
CONTEXT = 64  # tokens before the measured step
REPEATS = 3
FORMAT = "step-costs-2"


def step_costs(engine: Engine, info: WorkerInfo, cache_folder: Path) -> list[StepCost]:
    """Measured, or as an earlier start on this machine measured them."""
    path = cache_folder / FORMAT / f"{info.fingerprint[:24]}-{info.dtype}-{_slug(info.device)}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[StepCost])
    except (OSError, msgspec.DecodeError):
        pass
    started = time.perf_counter()
    costs = measure(engine, info)
    logger.info("measured step costs in %.1f s", time.perf_counter() - started)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(msgspec.to_builtins(costs)))
    except OSError as error:
        logger.warning("cannot keep the step costs: %s", error)
    return costs


def measure(engine: Engine, info: WorkerInfo) -> list[StepCost]:
    """The best of a few repeats of each (batch, width), on empty sequences of CONTEXT tokens."""
    costs: list[StepCost] = []
    for batch in CPU_BATCHES if is_cpu() else GPU_BATCHES:
        if batch > info.num_slots or info.max_model_len < 2 * CONTEXT:
            break
        engine.begin(_prompts(batch))
        engine.finish(engine.begin(_step(batch, 1)))
        for width in WIDTHS:
            seconds = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                engine.finish(engine.begin(_step(batch, width)))
                seconds.append(time.perf_counter() - started)
            costs.append(StepCost(batch=batch, width=width, seconds=min(seconds)))
        engine.reset()
    return costs


def _prompts(batch: int) -> Step:
    tokens = [1] * CONTEXT
    starts = [
        SequenceStart(
            slot=slot,
            request_id=RequestId(f"calibration-{slot}"),
            sampling=SamplingParams(temperature=0.0),
            num_prompt_tokens=CONTEXT,
            token_ids=tokens,
        )
        for slot in range(batch)
    ]
    rows = [StepRow(slot=slot, start=0, capacity=2 * CONTEXT, token_ids=tokens) for slot in range(batch)]
    return Step(epoch=0, step_id=0, starts=starts, decodes=[], prefills=rows)


def _step(batch: int, width: int) -> Step:
    rows = [
        StepRow(slot=slot, start=CONTEXT, capacity=2 * CONTEXT, token_ids=[1] * width, num_drafts=width - 1)
        for slot in range(batch)
    ]
    return Step(epoch=0, step_id=0, starts=[], decodes=rows, prefills=[])


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text)[:40]
