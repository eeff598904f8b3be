"""Heads that draft one token at a time from (feature, next token) pairs: the common part of EAGLE-3 and MTP.

The pair of position i is (feature of position i, token at position i+1) and its key sits at rope position i. With a
single layer a pair's key and value depend on nothing but the pair, so context rows are made without attention. The
feature of the last position waits in `state.pending` for its token: the anchor, at draft time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import mlx.core as mx

from workers.drafters.base import ContextState, Drafter, Drafts, Sampler, bucket, stack_context, start_writes
from workers.drafters.layers import Attention, rows_at_own_positions
from workers.drafters.vocabulary import Vocabulary


class RecursiveDrafter(Drafter):
    attention: Attention
    vocabulary: Vocabulary

    @abstractmethod
    def combine(self, features: mx.array, embeddings: mx.array) -> tuple[mx.array, mx.array]:
        """(attention input, residual) of pairs; all (..., H) but the input, which EAGLE-3 makes (..., 2H)."""

    @abstractmethod
    def finish(self, residual: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        """(row for the head, feature of the next step), each (..., H)."""

    def new_state(self, start: int = 0) -> ContextState:
        return ContextState(1, start)

    def can_draft(self, state: ContextState) -> bool:
        return state.pending is not None

    def extend(
        self, states: Sequence[ContextState], features: Sequence[mx.array], token_ids: Sequence[Sequence[int]]
    ) -> None:
        paired: list[tuple[ContextState, mx.array, Sequence[int]]] = []
        for state, rows, ids in zip(states, features, token_ids, strict=True):
            if rows.shape[0] != len(ids):
                raise ValueError(f"{rows.shape[0]} features for {len(ids)} tokens")
            if not ids:
                continue
            if state.pending is not None:
                paired.append((state, mx.concatenate([state.pending[None], rows[:-1]]), ids))
            elif len(ids) > 1:  # the first token's pair is cached already, or its feature was never known
                paired.append((state, rows[:-1], ids[1:]))
            state.pending = rows[-1]
            state.length += len(ids)
        if paired:
            self._append(paired)
        start_writes(states)

    def _append(self, paired: list[tuple[ContextState, mx.array, Sequence[int]]]) -> None:
        tokens = mx.array([t for _, _, ids in paired for t in ids], dtype=mx.int32)
        positions = [s.start + s.num_rows + i for s, _, ids in paired for i in range(len(ids))]
        rows = mx.concatenate([r for _, r, _ in paired])
        x, _ = self.combine(rows, self.vocabulary.embed(tokens))
        keys, values = rows_at_own_positions(self.attention, x, mx.array(positions, dtype=mx.int32))
        at = 0
        for state, _, ids in paired:
            state.append(0, keys[:, at : at + len(ids)], values[:, at : at + len(ids)])
            state.advance(len(ids))
            at += len(ids)

    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        pending = [s.pending for s in states if s.pending is not None]
        if len(pending) != len(states):
            raise ValueError("a state without its last feature cannot draft")
        feature = mx.stack(pending)[:, None]
        tokens = mx.array(list(anchors), dtype=mx.int32)
        positions = mx.array([s.length - 1 for s in states], dtype=mx.int32)
        num_rows = bucket(max(s.num_rows for s in states))
        keys, values = self._scratch(states, num_rows, num_tokens, feature.dtype)
        is_context = mx.arange(num_rows)[None] < mx.array([s.num_rows for s in states])[:, None]
        is_step = mx.arange(num_tokens)
        drafted = []
        for step in range(num_tokens):
            x, residual = self.combine(feature, self.vocabulary.embed(tokens)[:, None])
            q, gate = self.attention.queries(x, positions + step)
            k, v = self.attention.keys_values(x, positions + step)
            keys[:, :, num_rows + step] = k[:, :, 0]
            values[:, :, num_rows + step] = v[:, :, 0]
            own = mx.broadcast_to((is_step <= step)[None], (len(states), num_tokens))
            mask = mx.concatenate([is_context, own], axis=1)[:, None, None]
            row, feature = self.finish(residual, self.attention.attend(q, keys, values, mask, gate))
            tokens = self.vocabulary.pick(self.vocabulary.logits(row[:, 0]), step, sampler)
            drafted.append(tokens)
        return Drafts(mx.stack(drafted, axis=1))

    def _scratch(
        self, states: Sequence[ContextState], num_rows: int, num_tokens: int, dtype: mx.Dtype
    ) -> tuple[mx.array, mx.array]:
        """Copies of the context with room for this draft's own rows: each (B, Hkv, num_rows + num_tokens, D)."""
        attention = self.attention
        empty = mx.zeros((attention.num_kv_heads, num_rows + num_tokens, attention.head_dim), dtype=dtype)
        if all(s.has_rows for s in states):
            return stack_context(states, 0, num_rows + num_tokens)
        views = [s.view(0, num_rows + num_tokens) if s.has_rows else (empty, empty) for s in states]
        return mx.stack([k for k, _ in views]), mx.stack([v for _, v in views])

    def truncate(self, state: ContextState, length: int) -> int:
        """As `Drafter.truncate`; the feature of position length-1 is needed again, so that is where to go on."""
        if length >= state.length:
            return state.length
        state.pending = None
        state.start = min(state.start, max(length - 1, 0))
        state.length = max(length - 1, state.start)
        state.num_rows = min(state.num_rows, state.length - state.start)
        return state.length
