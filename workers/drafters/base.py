"""What every drafter offers.

Positions: a state covers positions `start .. length-1`; the anchor (the last committed token, not yet run through the
target) is at position `length`. Drafting never changes a state, so there is nothing to roll back after a verify.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from shared.messages import MediaItem
from workers.drafters.context import Contexts, ContextState
from workers.drafters.places import TokenPlaces
from workers.kernels.choice import AttentionChoice

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


class Drafter(ABC):
    """Proposes tokens for a batch of sequences, each with a state of its own."""

    max_draft_tokens: int

    @abstractmethod
    def new_state(self, start: int = 0) -> ContextState:
        """An empty state whose first row will be position `start` (not 0 when earlier features are gone)."""

    def places(self, media: Sequence[MediaItem]) -> TokenPlaces | None:
        """Where a sequence's tokens lie, for its states; None where this drafter counts positions in any case."""
        return None

    def release(self, state: ContextState) -> None:  # noqa: B027 - a drafter may have nothing to free
        """The sequence is over."""

    @abstractmethod
    def extend_rows(
        self, states: Sequence[ContextState], features: mx.array, token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Append committed rows: for sequence b, positions length_b .. length_b+n_b-1.

        Args:
            features: (n_0 + n_1 + ..., H) rows from the target's fusion; ignored by a "model" drafter.
            token_ids: for each sequence the n_b tokens *at* those positions.
        """

    def extend(
        self, states: Sequence[ContextState], features: Sequence[mx.array], token_ids: Sequence[Sequence[int]]
    ) -> None:
        """As `extend_rows`, with an array (n_b, H) for each sequence."""
        self.extend_rows(states, mx.concatenate(list(features)) if features else mx.zeros((0, 0)), token_ids)

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

    @abstractmethod
    def truncate(self, state: ContextState, length: int) -> int:
        """Forget positions from `length` on; return the position from which the caller has to extend again.

        That position may be `length - 1`: see the recursive heads.
        """


class FeatureDrafter(Drafter):
    """A drafter that reads the target's hidden rows and keeps context rows of its own."""

    contexts: Contexts

    def use_attention(self, choice: AttentionChoice | None) -> None:
        """Attend by the machine's kernels where `choice` has one."""
        self.contexts.use_attention(choice)

    @property
    @abstractmethod
    def num_query_heads(self) -> int:
        """Of every layer."""

    @property
    @abstractmethod
    def draft_widths(self) -> list[int]:
        """Query rows a sequence in the forwards of a draft, as far as they are causal; few, for each is a kernel."""

    def new_state(self, start: int = 0) -> ContextState:
        return self.contexts.new_state(start)

    def release(self, state: ContextState) -> None:
        self.contexts.release(state)

    def truncate(self, state: ContextState, length: int) -> int:
        if length < state.length:
            state.start = min(state.start, length)
            state.length = length
            state.num_rows = min(state.num_rows, length - state.start)
        return state.length


def row_counts(features: mx.array, token_ids: Sequence[Sequence[int]]) -> list[int]:
    """Rows of each sequence. Raises ValueError: there are not as many features as tokens."""
    counts = [len(ids) for ids in token_ids]
    if features.shape[0] != sum(counts):
        raise ValueError(f"{features.shape[0]} features for {sum(counts)} tokens")
    return counts


def arranged(values: mx.array, order: Sequence[int]) -> mx.array:
    """The caller's rows in `order`; `in_order` takes them back."""
    return values if list(order) == list(range(len(order))) else values[mx.array(list(order))]


def in_order(values: mx.array, order: Sequence[int]) -> mx.array:
    """Rows that were computed in `order`, as the caller has them."""
    if list(order) == list(range(len(order))):
        return values
    places = [0] * len(order)
    for place, index in enumerate(order):
        places[index] = place
    return values[mx.array(places)]
