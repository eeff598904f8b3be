"""Heads that draft one token at a time from (feature, next token) pairs: the common part of EAGLE-3 and MTP.

The pair of position i is (feature of position i, token at position i+1) and its key sits at the rope position of token
i: that is i, or where the target has it behind an image. With a single layer a pair's key and value depend on nothing
but the pair, so context rows are made without attention. The feature of the last position waits
(`Contexts.keep_pending`) for its token: the anchor, at draft time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from workers.drafters.base import Drafts, FeatureDrafter, Sampler, arranged, in_order, row_counts
from workers.drafters.context import ContextState
from workers.drafters.layers import Attention, rows_at_own_positions
from workers.drafters.vocabulary import Vocabulary


class RecursiveDrafter(FeatureDrafter):
    attention: Attention
    vocabulary: Vocabulary

    @abstractmethod
    def combine(self, features: mx.array, embeddings: mx.array) -> tuple[mx.array, mx.array]:
        """(attention input, residual) of pairs; all (..., H) but the input, which EAGLE-3 makes (..., 2H)."""

    @abstractmethod
    def finish(self, residual: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        """(row for the head, feature of the next step), each (..., H)."""

    @property
    def num_query_heads(self) -> int:
        return self.attention.num_heads

    @property
    def draft_widths(self) -> list[int]:
        return [1]

    def can_draft(self, state: ContextState) -> bool:
        return state.has_pending

    def extend_rows(
        self, states: Sequence[ContextState], features: mx.array, token_ids: Sequence[Sequence[int]]
    ) -> None:
        row_counts(features, token_ids)
        new = [(state, ids) for state, ids in zip(states, token_ids, strict=True) if ids]
        if not new:
            return
        # A feature pairs with the token behind it: the one that waited with the first new token, and so on.
        waiting = [state for state, _ in new if state.has_pending]
        source = mx.concatenate([self.contexts.pending(waiting), features]) if waiting else features
        taken: list[int] = []
        tokens: list[int] = []
        counts: list[int] = []
        last: list[int] = []
        place, first = 0, len(waiting)
        for state, ids in new:
            if state.has_pending:
                taken.append(place)
                place += 1
            # Otherwise the first token's pair is cached already, or its feature was never known.
            paired = ids if state.has_pending else ids[1:]
            taken += range(first, first + len(ids) - 1)
            tokens += paired
            counts.append(len(paired))
            first += len(ids)
            last.append(first - 1)
        owners = [state for state, _ in new]
        if tokens:
            self._append(owners, counts, source[mx.array(taken)], tokens)
        self.contexts.keep_pending(owners, source[mx.array(last)])
        for state, ids in new:
            state.length += len(ids)
        self.contexts.start_writes()

    def _append(
        self, states: Sequence[ContextState], counts: Sequence[int], rows: mx.array, tokens: Sequence[int]
    ) -> None:
        places = self.contexts.places(states, counts)
        at = [(s, s.start + s.num_rows + i) for s, n in zip(states, counts, strict=True) for i in range(n)]
        x, _ = self.combine(rows, self.vocabulary.embed(mx.array(list(tokens), dtype=mx.int32)))
        self.contexts.write(0, places, *rows_at_own_positions(self.attention, x, rope_positions(at)))
        self.contexts.advance(states, counts)

    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        if not all(self.can_draft(s) for s in states):
            raise ValueError("a state without its last feature cannot draft")
        # A sampler's rows are those of the caller, and its random numbers go by row: only the cache is reordered.
        order = self.contexts.arrange(states, num_tokens)
        owners = [states[i] for i in order]
        feature = self.contexts.pending(owners)[:, None]
        tokens = mx.array([anchors[i] for i in order], dtype=mx.int32)
        drafted = []
        for step in range(num_tokens):
            x, residual = self.combine(feature, self.vocabulary.embed(tokens)[:, None])
            positions = rope_positions([(state, state.length - 1 + step) for state in owners])
            q, gate = self.attention.queries(x, positions)
            k, v = self.attention.keys_values(x, positions)
            (view,) = self.contexts.views(owners, 1, step)
            attended = self.attention.output(view.attend(q, k, v, self.attention.scale), gate)
            row, feature = self.finish(residual, attended)
            drafted.append(self.vocabulary.pick(in_order(self.vocabulary.logits(row[:, 0]), order), step, sampler))
            tokens = arranged(drafted[-1], order)
        return Drafts(mx.stack(drafted, axis=1))

    def truncate(self, state: ContextState, length: int) -> int:
        """As `Drafter.truncate`; the feature of position length-1 is needed again, so that is where to go on."""
        if length >= state.length:
            return state.length
        state.has_pending = False
        state.start = min(state.start, max(length - 1, 0))
        state.length = max(length - 1, state.start)
        state.num_rows = min(state.num_rows, state.length - state.start)
        return state.length


def rope_positions(tokens: Sequence[tuple[ContextState, int]]) -> mx.array:
    """Of tokens, each by its state and its place in the sequence: (n,), or (3, n) where one lies on three axes."""
    if all(state.places is None for state, _ in tokens):
        return mx.array([index for _, index in tokens], dtype=mx.int32)
    found = [state.places.at(index) if state.places else np.full((3,), index) for state, index in tokens]
    return mx.array(np.stack(found, axis=1), dtype=mx.int32)
