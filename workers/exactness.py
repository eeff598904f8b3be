"""Measured at start: how far verifying several tokens at once is from decoding them one by one, on this machine.

A product of several rows may be summed in another order than that of one row. In float32 that is the last bits of a
logit; in bfloat16 it can turn around the two most likely tokens where they are nearly equal, and a greedy text with a
drafter then differs from one without, both being as right.
"""

from __future__ import annotations

import logging

import mlx.core as mx
import numpy as np

from shared.messages import Exactness, RequestId, SamplingParams, SequenceStart, Step, StepRow, WorkerInfo
from workers.arrays import to_list
from workers.engine import Engine

logger = logging.getLogger("target")

NUM_PROMPT, NUM_POSITIONS = 16, 8
WIDTHS = (2, 4, 8)  # each divides NUM_POSITIONS
SLOT = 0


def probe(engine: Engine, info: WorkerInfo) -> Exactness | None:
    """Decode a few greedy tokens, verify the same ones at a few widths, compare all logits; None for a tiny context."""
    capacity = NUM_PROMPT + NUM_POSITIONS + 1
    if info.max_model_len < capacity:
        return None
    prompt = [(7919 * i + 13) % info.vocab_size for i in range(NUM_PROMPT)]
    engine.finish(engine.begin(_prefill(prompt, capacity)))
    start = engine.store.snapshot(SLOT)
    tokens, single = [prompt[-1]], []
    for i in range(NUM_POSITIONS):
        single.append(_logits(engine, NUM_PROMPT + i, tokens[-1:]))
        tokens.append(to_list(mx.argmax(single[-1], axis=-1))[0])
    decoded = np.array(mx.concatenate(single))
    difference, num_flipped = 0.0, 0
    for width in WIDTHS:
        engine.store.restore(SLOT, start)
        parts = [_logits(engine, NUM_PROMPT + i, tokens[i : i + width]) for i in range(0, NUM_POSITIONS, width)]
        verified = np.array(mx.concatenate(parts))
        difference = max(difference, float(np.abs(verified - decoded).max()))
        num_flipped += int((verified.argmax(axis=1) != decoded.argmax(axis=1)).sum())
    engine.reset()
    top_two = np.sort(decoded, axis=1)[:, -2:]
    gap = float((top_two[:, 1] - top_two[:, 0]).min())
    found = Exactness(
        widths=list(WIDTHS),
        num_positions=NUM_POSITIONS,
        max_logit_difference=difference,
        min_top_two_gap=gap,
        num_flipped=num_flipped,
        can_ties_flip=num_flipped > 0 or gap <= 2 * difference,
    )
    logger.info("%s", describe(found))
    return found


def _prefill(prompt: list[int], capacity: int) -> Step:
    start = SequenceStart(
        slot=SLOT,
        request_id=RequestId("exactness"),
        sampling=SamplingParams(temperature=0.0),
        num_prompt_tokens=len(prompt),
        token_ids=prompt,
    )
    row = StepRow(slot=SLOT, start=0, capacity=capacity, token_ids=prompt)
    return Step(epoch=0, step_id=0, starts=[start], decodes=[], prefills=[row])


def _logits(engine: Engine, start: int, tokens: list[int]) -> mx.array:
    """Float32 logits (n, V) of `tokens` at positions start ..; evaluated, with the rows that the caches keep."""
    batch = engine.store.open([SLOT], [start], len(tokens))
    hidden = engine.model.hidden_rows(mx.array([tokens]), batch.layers, [(0, len(tokens))])
    batch.close()
    logits = engine.model.head(hidden).astype(mx.float32)
    mx.eval(logits, *engine.store.pending())
    return logits


def describe(found: Exactness) -> str:
    """One line for the log."""
    verdict = "greedy ties can flip" if found.can_ties_flip else "no greedy tie was near flipping"
    return (
        f"verifying {', '.join(map(str, found.widths))} tokens at once: logits differ from decoding by at most "
        f"{found.max_logit_difference:.2g}, smallest gap of the top two {found.min_top_two_gap:.2g}; {verdict}"
    )
