"""States of recurrent layers (SSM, gated delta net, short convolution): one immutable set of arrays per slot.

States are never written in place, so keeping an earlier one is keeping a reference: that is how a rejected draft is
rolled back.
"""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from workers.cache.spec import RecurrentSpec

State = list[mx.array | None]


class RecurrentLayer:
    def __init__(self, spec: RecurrentSpec) -> None:
        self.spec = spec
        self._batches: dict[int, tuple[State, int]] = {}  # slot -> (arrays of a batch, this slot's row in them)

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

    def store(self, slots: list[int], arrays: State) -> None:
        batch = list(arrays)
        for i, slot in enumerate(slots):
            self._batches[slot] = (batch, i)

    def snapshot(self, slot: int) -> tuple[State, int] | None:
        return self._batches.get(slot)

    def restore(self, slot: int, state: tuple[State, int] | None) -> None:
        if state is None:
            self._batches.pop(slot, None)
        else:
            self._batches[slot] = state

    def release(self, slot: int) -> None:
        self._batches.pop(slot, None)

    def pending(self) -> list[mx.array]:
        """All arrays held, for evaluation."""
        seen = {id(b): b for b, _ in self._batches.values()}
        return [a for batch in seen.values() for a in batch if a is not None]

    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.pending())


class RecurrentView(ArraysCache):  # type: ignore[misc] # mlx-lm has no types
    """One recurrent layer as the rows of one forward see it, in mlx-lm's ArraysCache protocol.

    A subclass, since mlx-lm's mamba writes its state back only where it finds an ArraysCache.

    `lengths` (B,) are the real tokens of each row in a padded step, None where nothing is padded.
    """

    def __init__(
        self, layer: RecurrentLayer, slots: list[int], lengths: mx.array | None, offset: int | mx.array
    ) -> None:
        super().__init__(layer.spec.num_arrays)
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
        self._layer.store(self._slots, self._state)
