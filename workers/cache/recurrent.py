"""States of recurrent layers (SSM, gated delta net, short convolution): one immutable set of arrays per slot.

States are never written in place, so keeping an earlier one is keeping a reference. A rejected draft is rolled back in
one of two ways: layers of ours leave a `Trail`, from which the state after any of the step's tokens is computed in one
go for all rows; for others the state before the step is put back, and the accepted tokens are fed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from workers.cache.spec import RecurrentSpec

State = list[mx.array | None]


class Trail(Protocol):
    """What a layer keeps of a step that verifies drafts: the state before it and what each token changes."""

    lengths: list[int]
    """Real tokens of each row."""

    def rewound(self, counts: tuple[int, ...]) -> State:
        """The states (B, ...) after the first counts[i] tokens of row i."""


class RecurrentLayer:
    def __init__(self, spec: RecurrentSpec) -> None:
        self.spec = spec
        self._batches: dict[int, tuple[State, int]] = {}  # slot -> (arrays of a batch, this slot's row in them)
        self._trails: dict[int, tuple[Trail, int]] = {}  # slot -> (trail of a batch, this slot's row in it)

    def stacked(self, slots: list[int]) -> State:
        """The slots' states as batch arrays (B, ...); None where no slot has one yet."""
        held = [self._batches.get(slot) for slot in slots]
        if all(h is None for h in held):
            return [None] * self.spec.num_arrays
        first = next(h for h in held if h is not None)
        size = next((a.shape[0] for a in first[0] if a is not None), 0)
        if size == len(slots) and all(h is not None and h[0] is first[0] and h[1] == i for i, h in enumerate(held)):
            return list(first[0])  # the same batch as last time: nothing to copy
        return [self._stack(held, i) for i in range(self.spec.num_arrays)]

    def _stack(self, held: list[tuple[State, int] | None], index: int) -> mx.array | None:
        rows = [None if h is None or (a := h[0][index]) is None else a[h[1] : h[1] + 1] for h in held]
        known = next((r for r in rows if r is not None), None)
        if known is None:
            return None
        return mx.concatenate([mx.zeros_like(known) if r is None else r for r in rows])

    def store(self, slots: list[int], arrays: State, trail: Trail | None = None) -> None:
        batch = list(arrays)
        for i, slot in enumerate(slots):
            self._batches[slot] = (batch, i)
            if trail is None:
                self._trails.pop(slot, None)
            else:
                self._trails[slot] = (trail, i)

    def rewind(self, num_kept: Mapping[int, int]) -> None:
        """Give slots the states after the first tokens of their last row: num_kept[slot] of them.

        Other rows of the same batch stay where they are, so that the batch stays one.
        """
        trails = {id(self._trails[slot][0]): self._trails[slot][0] for slot in num_kept if slot in self._trails}
        for trail in trails.values():
            rows = {row: slot for slot, (held, row) in self._trails.items() if held is trail}
            counts = tuple(num_kept.get(rows[i], n) if i in rows else n for i, n in enumerate(trail.lengths))
            states = trail.rewound(counts)
            for row, slot in rows.items():
                self._batches[slot] = (states, row)
                del self._trails[slot]

    def snapshot(self, slot: int) -> tuple[State, int] | None:
        return self._batches.get(slot)

    def restore(self, slot: int, state: tuple[State, int] | None) -> None:
        self._trails.pop(slot, None)
        if state is None:
            self._batches.pop(slot, None)
        else:
            self._batches[slot] = state

    def release(self, slot: int) -> None:
        self._batches.pop(slot, None)
        self._trails.pop(slot, None)

    def pending(self) -> list[mx.array]:
        """All arrays held, for evaluation."""
        seen = {id(b): b for b, _ in self._batches.values()}
        return [a for batch in seen.values() for a in batch if a is not None]

    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.pending())


class RecurrentView(ArraysCache):  # type: ignore[misc] # mlx-lm has no types
    """One recurrent layer as the rows of one forward see it, in mlx-lm's ArraysCache protocol.

    A subclass, since mlx-lm's mamba writes its state back only where it finds an ArraysCache.

    `lengths` (B,) are the real tokens of each row in a padded step, None where nothing is padded. Where `has_drafts`, a
    layer that can leaves a `trail`; `host_lengths` are for it.
    """

    has_drafts = False
    trail: Trail | None = None

    def __init__(
        self,
        layer: RecurrentLayer,
        slots: list[int],
        lengths: mx.array | None,
        offset: int | mx.array,
        host_lengths: list[int],
    ) -> None:
        super().__init__(layer.spec.num_arrays)
        self.host_lengths = host_lengths
        self._layer = layer
        self._slots = slots
        self._state = layer.stacked(slots)
        self.cache = self._state
        self.lengths = lengths
        self.left_padding = None
        self.offset = offset

    def __getitem__(self, index: int) -> mx.array | None:
        return self._state[index]

    def __setitem__(self, index: int, value: mx.array | None) -> None:
        self._state[index] = value

    def make_mask(self, n: int) -> mx.array | None:
        return None if self.lengths is None else mx.arange(n)[None] < self.lengths[:, None]

    def advance(self, n: int) -> None:
        """mlx-lm's models tell how far they went; a view lives for one forward, so nothing is to be remembered."""

    def empty(self) -> bool:
        return self._state[0] is None

    def close(self) -> None:
        """Keep the new state for each slot."""
        self._layer.store(self._slots, self._state, self.trail)
