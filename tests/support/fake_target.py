"""A target worker without a model: the next token is a pure function of the tokens before it.

It checks what a real one relies on: rows continue where the slot's content ends, capacities hold, slots are bound.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from shared.messages import Release, RowResult, SequenceStart, Step, StepResult, StepRow, WorkerInfo
from workers.accept import count_accepted

VOCAB = 3


def next_token(tokens: Sequence[int], vocab_size: int = VOCAB) -> int:
    """Deterministic, and depends on the whole prefix."""
    h = len(tokens)
    for t in tokens[-12:]:
        h = (h * 31 + t * 7 + 5) % 1_000_003
    return h % vocab_size


def greedy(prompt: Sequence[int], num_tokens: int, vocab_size: int = VOCAB) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


def worker_info(**changes: object) -> WorkerInfo:
    values: dict[str, object] = {
        "model": "fake",
        "architecture": "fake",
        "fingerprint": "f",
        "device": "none",
        "dtype": "float32",
        "vocab_size": VOCAB,
        "max_model_len": 64,
        "num_slots": 3,
        "kv_capacity_tokens": 96,
        "capacity_classes": [8, 32, 64],
        "kv_bytes_per_token": 1,
        "max_step_tokens": 16,
        "eos_token_ids": [],
    }
    values.update(changes)
    return WorkerInfo(**values)  # type: ignore[arg-type]


@dataclass
class Slot:
    tokens: list[int]  # content of the cache
    capacity: int
    last: int | None = None  # last sampled token, as if on the device


class FakeTarget:
    def __init__(self, info: WorkerInfo, seed: int = 0) -> None:
        self.info = info
        self.slots: dict[int, Slot] = {}
        self.random = random.Random(seed)

    def release(self, message: Release) -> None:
        for slot in message.slots:
            del self.slots[slot]

    def run(self, step: Step) -> StepResult:
        assert step.decodes or step.prefills, "an empty step"
        rows = (*step.decodes, *step.prefills)
        assert len({r.slot for r in rows}) == len(rows), "a slot twice in one step"
        assert sum(len(r.token_ids or [0]) for r in rows) <= self.info.max_step_tokens, "over the token budget"
        for start in step.starts:
            self._bind(start)
        assert sum(s.capacity for s in self.slots.values()) <= self.info.kv_capacity_tokens, "over the KV budget"
        results = [r for row in rows if (r := self._row(row)) is not None]
        return StepResult(epoch=step.epoch, step_id=step.step_id, rows=results, phases={"device": 0.001})

    def _bind(self, start: SequenceStart) -> None:
        assert start.slot not in self.slots, "a slot bound while in use"
        assert 0 <= start.slot < self.info.num_slots
        self.slots[start.slot] = Slot([], 0)

    def _row(self, row: StepRow) -> RowResult | None:
        slot = self.slots[row.slot]
        assert row.start <= len(slot.tokens), "a gap in the cache"
        assert row.capacity >= slot.capacity, "a slot shrank"
        assert row.num_drafts <= self.info.max_draft_tokens, "more drafts than the caches take"
        slot.capacity = row.capacity
        inputs = row.token_ids
        if inputs is None:
            assert slot.last is not None and row.num_drafts == 0, "no token on the device"
            inputs = [slot.last]
        slot.tokens = slot.tokens[: row.start] + inputs
        assert len(slot.tokens) <= slot.capacity, "over the slot's capacity"
        if not row.is_sampled:
            return None
        first = len(slot.tokens) - row.num_drafts
        drawn = [next_token(slot.tokens[: first + i], self.info.vocab_size) for i in range(row.num_drafts + 1)]
        n = count_accepted(inputs[len(inputs) - row.num_drafts :] if row.num_drafts else [], drawn)
        slot.last = drawn[0] if row.num_drafts == 0 else None
        return RowResult(slot=row.slot, token_ids=drawn[: n + 1])
