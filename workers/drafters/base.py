"""What every drafter offers, and the context state it keeps for each sequence.

Positions: a state covers positions `start .. length-1`; the anchor (the last committed token, not yet run through the
target) is at position `length`. Drafting never changes a state: rows that a drafter makes for its own proposals live
in scratch memory of that call, so there is nothing to roll back after a verify.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

Sampler = Callable[[mx.array, int], mx.array]
"""(logits (B, V) over the target's vocabulary, draft step) -> token ids (B,). May record the q it drew from."""

Embed = Callable[[mx.array], mx.array]
"""Token ids (...) -> the target's input embeddings (..., H), without any scale that the target's model applies."""

Head = Callable[[mx.array], mx.array]
"""Hidden rows (..., H) after the drafter's norm -> logits (..., V), before any softcap."""


class Drafts(NamedTuple):
    """Lazy arrays; the caller evaluates them together."""

    token_ids: mx.array  # (B, k) int32, in the target's vocabulary
    confidences: mx.array | None = None  # (B, k) estimated chance that the target accepts, where the drafter has a head


class ContextState:
    """Context K/V of one sequence: one row per position, every layer, in buffers that grow geometrically."""

    def __init__(self, num_layers: int, start: int = 0) -> None:
        self.start = start
        self.length = start
        self.num_rows = 0  # rows start .. start+num_rows-1 are in the buffers
        self.pending: mx.array | None = (
            None  # recursive heads: (H,) feature of position length-1, waiting for its token
        )
        self._keys: list[mx.array | None] = [None] * num_layers  # (Hkv, capacity, D)
        self._values: list[mx.array | None] = [None] * num_layers

    @property
    def num_bytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())

    def arrays(self) -> list[mx.array]:
        """Everything to evaluate so that no graph grows behind this state."""
        held = [a for a in (*self._keys, *self._values) if a is not None]
        return held if self.pending is None else [*held, self.pending]

    def append(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Write (Hkv, n, D) rows behind the present ones; `advance` counts them once all layers are written."""
        self._keys[layer] = _write(self._keys[layer], keys, self.num_rows)
        self._values[layer] = _write(self._values[layer], values, self.num_rows)

    def advance(self, num_rows: int) -> None:
        self.num_rows += num_rows

    def view(self, layer: int, num_rows: int) -> tuple[mx.array, mx.array]:
        """The first `num_rows` of this layer's (keys, values), zeros where the buffer is shorter; some may be stale.

        Raises:
            ValueError: nothing was ever written, so the shapes are unknown.
        """
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise ValueError("the state has no rows yet")
        return _fit(keys, num_rows), _fit(values, num_rows)

    @property
    def has_rows(self) -> bool:
        return self._keys[0] is not None


class Drafter(ABC):
    """Proposes tokens for a batch of sequences, each with a state of its own."""

    max_draft_tokens: int

    @abstractmethod
    def new_state(self, start: int = 0) -> ContextState:
        """An empty state whose first row will be position `start` (not 0 when earlier features are gone)."""

    @abstractmethod
    def extend(
        self, states: Sequence[ContextState], features: Sequence[mx.array], token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Append committed rows: for sequence b, positions length_b .. length_b+n_b-1.

        Args:
            features: for each sequence (n_b, H) rows from the target's fusion; ignored by a "model" drafter.
            token_ids: for each sequence the n_b tokens *at* those positions; ignored by DFlash.
        """

    @abstractmethod
    def can_draft(self, state: ContextState) -> bool:
        """Whether enough context is there; otherwise extend from `state.length` first."""

    @abstractmethod
    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        """Propose `num_tokens` (1 .. max_draft_tokens) after each anchor; greedy without a sampler.

        The anchor of sequence b is the token at position states[b].length. Nothing is evaluated here.
        """

    def truncate(self, state: ContextState, length: int) -> int:
        """Forget positions from `length` on; return the position from which the caller has to extend again.

        That position may be `length - 1`: see the recursive heads.
        """
        if length < state.length:
            state.start = min(state.start, length)
            state.length = length
            state.num_rows = min(state.num_rows, length - state.start)
        return state.length


def start_writes(states: Sequence[ContextState]) -> None:
    """Start evaluating rows that were just appended: they are committed, so no graph needs to grow behind a state."""
    mx.async_eval(*[a for state in states for a in state.arrays()])  # type: ignore[no-untyped-call]  # MLX's stub


def bucket(num_rows: int) -> int:
    """`num_rows` rounded up by at most 12.5 % (or to 64), so that few different shapes reach the device."""
    step = 64
    while step * 8 < num_rows:
        step *= 2
    return -(-max(num_rows, 1) // step) * step


def stack_context(states: Sequence[ContextState], layer: int, num_rows: int) -> tuple[mx.array, mx.array]:
    """One layer's (keys, values) of all sequences, right-padded: each (B, Hkv, num_rows, D)."""
    views = [state.view(layer, num_rows) for state in states]
    return mx.stack([k for k, _ in views]), mx.stack([v for _, v in views])


def _write(buffer: mx.array | None, rows: mx.array, at: int) -> mx.array:
    heads, num_rows, head_dim = rows.shape
    end = at + num_rows
    if buffer is None or buffer.shape[1] < end:
        capacity = bucket(max(end, 0 if buffer is None else buffer.shape[1] * 3 // 2))
        grown = mx.zeros((heads, capacity, head_dim), dtype=rows.dtype)
        if buffer is not None and at:
            grown[:, :at] = buffer[:, :at]
        buffer = grown
    buffer[:, at:end] = rows
    return buffer


def _fit(buffer: mx.array, num_rows: int) -> mx.array:
    if buffer.shape[1] >= num_rows:
        return buffer[:, :num_rows]
    return mx.pad(buffer, [(0, 0), (0, num_rows - buffer.shape[1]), (0, 0)])
