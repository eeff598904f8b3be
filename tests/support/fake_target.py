"""A target worker without a model: the next token is a pure function of the tokens before it.

It checks what a real one relies on: rows continue where the slot's content ends, capacities hold, slots are bound. Its
prefix cache holds tokens in the place of tensors, so a block that is restored for the wrong text is seen at once, and
so is a slot whose sliding window or recurrent state is not that of its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.planner import OVERDRAFT
from shared.messages import (
    BlocksLoaded,
    BlockStore,
    LoadBlocks,
    PrefixCacheInfo,
    Release,
    RowResult,
    SequenceStart,
    Step,
    StepResult,
    StepRow,
    WorkerInfo,
)
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
    in_window: set[int] = field(default_factory=set)  # positions whose rows the sliding layers hold
    state: list[int] | None = field(default_factory=list)  # tokens that the recurrent state has seen
    num_shared: int = 0  # blocks that the cache names too, where it does not copy them


@dataclass
class CachedBlock:
    tokens: list[int]  # the whole prefix up to the block's end
    has_window: bool


class FakeTarget:
    def __init__(self, info: WorkerInfo, seed: int = 0) -> None:
        self.info = info
        self.slots: dict[int, Slot] = {}
        self.random = random.Random(seed)
        self.cache = info.prefix_cache
        self.blocks: dict[int, CachedBlock] = {}
        self.states: dict[int, list[int] | None] = {}
        self.phases = {"device": 0.001}  # of every step
        self.archive: dict[bytes, tuple[CachedBlock, list[int] | None]] = {}  # outlives the process if handed on

    def release(self, message: Release) -> None:
        for store in message.stores:
            self._store(store)
        for slot in message.slots:
            del self.slots[slot]
        if message.shrink is not None:
            self.blocks = {i: block for i, block in self.blocks.items() if i in message.shrink.kept_blocks}
            for state_id in message.shrink.free_states:
                self.states.pop(state_id, None)

    def load(self, message: LoadBlocks) -> BlocksLoaded:
        """Blocks that the archive holds; the others are reported as gone."""
        is_loaded = []
        for i, (block_hash, block_id) in enumerate(zip(message.hashes, message.block_ids, strict=True)):
            held = self.archive.get(block_hash)
            if held is not None and i in message.states and held[1] is None:
                held = None
            is_loaded.append(held is not None)
            if held is not None:
                self.blocks[block_id] = held[0]
                if i in message.states:
                    self.states[message.states[i]] = held[1]
        return BlocksLoaded(epoch=message.epoch, load_id=message.load_id, is_loaded=is_loaded)

    def _store(self, store: BlockStore) -> None:
        assert self.cache is not None, "blocks to store and no cache"
        slot, size = self.slots[store.slot], self.cache.block_size
        for i, (index, block_id, has_window) in enumerate(
            zip(store.indices, store.block_ids, store.has_window, strict=True)
        ):
            end = (index + 1) * size
            assert end <= len(slot.tokens), "a block that is not computed"
            assert 0 <= block_id < self.cache.num_blocks
            if has_window and self.cache.ring_tokens:
                assert slot.in_window >= set(range(index * size, end)), "sliding rows that are overwritten"
            self.blocks[block_id] = CachedBlock(slot.tokens[:end], has_window)
            if i in store.states:
                assert self.states[store.states[i]] == slot.tokens[:end], "the state of another place"
            state = list(slot.tokens[:end]) if i in store.states else None
            old, old_state = self.archive.get(store.hashes[i], (None, None))
            archived = CachedBlock(slot.tokens[:end], has_window or (old is not None and old.has_window))
            self.archive[store.hashes[i]] = (archived, state or old_state)  # a copy only ever gains

    def _differing(self, check: BlockStore) -> list[bytes]:
        assert self.cache is not None, "blocks to check and no cache"
        size, tokens = self.cache.block_size, self.slots[check.slot].tokens
        return [
            block_hash
            for index, block_id, block_hash in zip(check.indices, check.block_ids, check.hashes, strict=True)
            if self.blocks[block_id].tokens != tokens[: (index + 1) * size]
        ]

    def _restore(self, slot: Slot, start: SequenceStart) -> None:
        assert self.cache is not None, "blocks to restore and no cache"
        size, end = self.cache.block_size, len(start.restore) * self.cache.block_size
        for i, block_id in enumerate(start.restore):
            block = self.blocks[block_id]
            assert block.tokens == start.token_ids[: (i + 1) * size], "a block of another text"
            if block.has_window:
                slot.in_window |= set(range(i * size, (i + 1) * size))
        slot.tokens = start.token_ids[:end]
        slot.num_shared = len(start.restore)
        if self.cache.is_recurrent:
            assert start.restore_state is not None, "a recurrent model restored without a state"
            slot.state = self.states[start.restore_state]
            assert slot.state == slot.tokens, "the state of another text"

    def run(self, step: Step) -> StepResult:
        assert step.decodes or step.prefills, "an empty step"
        rows = (*step.decodes, *step.prefills)
        assert len({r.slot for r in rows}) == len(rows), "a slot twice in one step"
        budget = self.info.max_step_tokens
        num_tokens = sum(len(r.token_ids or [0]) for r in rows)
        assert num_tokens <= budget + budget // OVERDRAFT, "over the token budget, the end of a prompt considered"
        assert all(len(r.token_ids or [0]) <= budget for r in rows), "a row wider than the caches take"
        for start in step.starts:
            self._bind(start)
        self._check_budget(step)
        results = [r for row in rows if (r := self._row(row)) is not None]
        for store in step.stores:
            self._store(store)
        differing = [h for check in step.checks for h in self._differing(check)]
        return StepResult(
            epoch=step.epoch, step_id=step.step_id, rows=results, phases=dict(self.phases), differing=differing
        )

    def _check_budget(self, step: Step) -> None:
        """Slots hold no more than there is for them; blocks that the cache holds as well are paid by the cache."""
        size = self.cache.block_size if self.cache is not None and self.cache.is_shared else 0
        for store in step.stores:
            self.slots[store.slot].num_shared += len(store.indices)
        held = sum(s.capacity - s.num_shared * size for s in self.slots.values())
        assert held <= self.info.kv_capacity_tokens, "over the KV budget"

    def _bind(self, start: SequenceStart) -> None:
        assert start.slot not in self.slots, "a slot bound while in use"
        assert 0 <= start.slot < self.info.num_slots
        slot = self.slots[start.slot] = Slot([], start.capacity)
        if start.restore:
            self._restore(slot, start)

    def _check_layers(self, cache: PrefixCacheInfo, slot: Slot, start: int) -> None:
        """What sliding layers read is there; then the row's own positions overwrite the oldest of the ring."""
        if cache.ring_tokens:
            slot.in_window = {p for p in slot.in_window if p < start}
            wanted = set(range(max(0, start - cache.window + 1), start))
            assert slot.in_window >= wanted, "the window has a hole"
            written = range(start, len(slot.tokens))
            slot.in_window |= set(written)
            ring = cache.ring_tokens + self.info.max_draft_tokens
            slot.in_window -= {p - ring for p in written}

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
        if self.cache is not None:
            self._check_layers(self.cache, slot, row.start)
            if row.keep_state is not None:
                self.states[row.keep_state] = list(slot.tokens)
        if not row.is_sampled:
            return None
        first = len(slot.tokens) - row.num_drafts
        drawn = [next_token(slot.tokens[: first + i], self.info.vocab_size) for i in range(row.num_drafts + 1)]
        n = count_accepted(inputs[len(inputs) - row.num_drafts :] if row.num_drafts else [], drawn)
        slot.last = drawn[0] if row.num_drafts == 0 else None
        return RowResult(slot=row.slot, token_ids=drawn[: n + 1])
