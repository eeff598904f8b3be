"""Context K/V of the sequences that a drafter knows, in the target's own kind of cache: slots, classes, kernels.

Rows of a draft itself are written behind the committed ones and overwritten by the next committed rows, so there is
nothing to roll back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from workers.arrays import start_evaluating
from workers.cache.kv import KVView
from workers.cache.spec import AttentionSpec
from workers.cache.store import CacheStore
from workers.drafters.places import TokenPlaces
from workers.kernels.choice import AttentionChoice
from workers.machine import is_cpu

CAPACITIES = [512 << (2 * i) for i in range(7)]  # rows; pools are made when the first sequence needs one
MAX_BLOCK = 64  # rows of one draft
SLACK = 64  # behind a slot's capacity, for a draft's own rows


class ContextState:
    """What is known of one sequence: positions start .. start+num_rows-1 have rows in the cache."""

    def __init__(self, start: int = 0, slot: int = -1) -> None:
        self.start = start
        self.length = start
        self.num_rows = 0
        self.num_written = 0  # rows ever in use: those beyond num_rows were truncated, and may lie over older ones
        self.slot = slot
        self.has_pending = False  # recursive heads: the feature of position length-1 waits for its token
        self.places: TokenPlaces | None = None  # None: rope positions are counted


@dataclass(frozen=True)
class Places:
    """Where rows of several sequences go."""

    by_class: list[tuple[int, mx.array | None, mx.array, mx.array]]
    """(capacity class, which of the rows: None for all, their pool rows, their indices there)"""


class Contexts:
    """Args:
    specs: one per layer of the drafter.
    dtype: of keys and values.
    """

    def __init__(self, specs: Sequence[AttentionSpec], dtype: mx.Dtype) -> None:
        self.store = CacheStore(list(specs), CAPACITIES, MAX_BLOCK, dtype, is_cpu(), SLACK)
        self._free: list[int] = []
        self._num_slots = 0
        self._pending: mx.array | None = None  # (slots, H)

    def use_attention(self, choice: AttentionChoice | None) -> None:
        self.store.use_attention(choice)

    def new_state(self, start: int = 0) -> ContextState:
        if not self._free:
            self._free.append(self._num_slots)
            self._num_slots += 1
        return ContextState(start, self._free.pop())

    def release(self, state: ContextState) -> None:
        """The sequence is over; its slot is free."""
        if state.slot >= 0:
            if state.slot in self.store.placement:
                self.store.release(state.slot)
            self._free.append(state.slot)
            state.slot = -1

    # ------------------------------------------------ committed rows

    def places(self, states: Sequence[ContextState], counts: Sequence[int], layer: int = 0) -> Places:
        """Room for counts[b] more rows of each state; `advance` counts them once every layer wrote them.

        Layers of one capacity have the same places. A sliding layer's is that of its ring, which the last rows fill.
        """
        by_class: dict[int, tuple[list[int], list[int], list[int]]] = {}
        for state, n in zip(states, counts, strict=True):
            self._ensure(state, n)
        first = 0
        for state, n in zip(states, counts, strict=True):
            if n:
                capacity_class, row = self.store.placement.where(state.slot)
                chosen, rows, indices = by_class.setdefault(capacity_class, ([], [], []))
                capacity = self.store.kv_layers[layer].capacities[capacity_class]
                skipped = max(0, n - capacity)
                chosen += range(first + skipped, first + n)
                rows += [row] * (n - skipped)
                indices += (i % capacity for i in range(state.num_rows + skipped, state.num_rows + n))
            first += n
        return Places([
            (c, None if len(chosen) == first else mx.array(chosen), mx.array(rows), mx.array(indices))
            for c, (chosen, rows, indices) in by_class.items()
        ])  # fmt: skip

    def write(self, layer: int, places: Places, keys: mx.array, values: mx.array) -> None:
        """Args:
        keys, values: (N, num_kv_heads, dim) of all rows, in the order of the states.
        """
        for capacity_class, chosen, rows, indices in places.by_class:
            k, v = (keys, values) if chosen is None else (keys[chosen], values[chosen])
            self.store.kv_layers[layer].scatter(capacity_class, rows, indices, k, v)

    def advance(self, states: Sequence[ContextState], counts: Sequence[int]) -> None:
        for state, n in zip(states, counts, strict=True):
            state.num_rows += n
            state.num_written = max(state.num_written, state.num_rows)
            if n:
                self.store.set_length(state.slot, state.num_rows)

    def start_writes(self) -> None:
        """Start evaluating: no graph grows behind committed rows."""
        arrays = self.store.pending()
        start_evaluating(arrays if self._pending is None else [*arrays, self._pending])

    # ------------------------------------------------ the feature that waits for its token

    def pending(self, states: Sequence[ContextState]) -> mx.array:
        """(B, H) of states that have one."""
        assert self._pending is not None, "no feature was ever kept"
        return self._pending[mx.array([state.slot for state in states])]

    def keep_pending(self, states: Sequence[ContextState], features: mx.array) -> None:
        """Features (B, H), one of each state."""
        held = self._pending
        if held is None or held.shape[0] < self._num_slots:
            fresh = mx.zeros((max(8, 2 * self._num_slots), features.shape[-1]), features.dtype)
            if held is not None:
                fresh[: held.shape[0]] = held
            held = fresh
        held[mx.array([state.slot for state in states])] = features
        self._pending = held
        for state in states:
            state.has_pending = True

    # ------------------------------------------------ drafting

    def arrange(self, states: Sequence[ContextState], num_tokens: int) -> list[int]:
        """Room for a draft of `num_tokens` rows; the order of the states in which the cache has them side by side."""
        for state in states:
            self._ensure(state, num_tokens)
        return self.store.open([s.slot for s in states], [s.num_rows for s in states], 1).order

    def views(
        self, states: Sequence[ContextState], num_tokens: int, step: int = 0, is_causal: bool = True
    ) -> list[KVView]:
        """Every layer, for states as `arrange` has them, at `num_tokens` rows behind the context and `step` others.

        Not causal: the rows see each other all, where a layer's `attend` is asked to.
        """
        starts = [state.num_rows + step for state in states]
        spans = None if is_causal else [[(start, start + num_tokens)] for start in starts]
        batch = self.store.open([s.slot for s in states], starts, num_tokens, spans=spans)
        assert batch.order == list(range(len(states))), "states that were not arranged"
        return [view for view in batch.layers if isinstance(view, KVView)]

    def rows(self, state: ContextState, layer: int) -> tuple[mx.array, mx.array]:
        """A layer's keys and values of one state, each (num_kv_heads, num_rows, dim)."""
        capacity_class, row = self.store.placement.where(state.slot)
        keys, values = self.store.kv_layers[layer].rows(capacity_class, row, state.num_rows)
        return keys, values

    def _ensure(self, state: ContextState, num_rows: int) -> None:
        assert state.slot >= 0, "a state that was released"
        self.store.ensure(state.slot, max(1, state.num_rows + num_rows))
