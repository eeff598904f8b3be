"""Drafter state of every sequence: committed tokens, features that have come, context rows; and drafting for a batch.

No socket here. Features and tokens arrive on different roads and in any order; a sequence can be drafted for once the
features of all positions before its anchor are there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from shared.messages import Draft, DraftDistribution, DraftRow, FeatureRows, RequestId
from workers.arrays import to_list
from workers.drafters.base import Drafter
from workers.drafters.context import ContextState
from workers.drafters.draw import DraftSampler
from workers.drafters.places import TokenPlaces
from workers.features import Bits, from_bits

MAX_SEQUENCES = 1024  # beyond what the scheduler ends; the least recently used goes first
NUM_ENDED_REMEMBERED = 4096  # features of these may still be on their way


@dataclass
class DraftedSequence:
    tokens: list[int] = field(default_factory=list)
    state: ContextState | None = None
    features: list[Bits] = field(default_factory=list)  # rows not taken in yet, (n, H) each, without gaps
    num_features: int = 0  # position after the last of them
    start: int = 0  # position of the first of them, while nothing was taken in
    places: TokenPlaces | None = None

    def keep_features(self, length: int) -> None:
        """Forget rows from position `length` on, as far as they were not taken in (those are of committed tokens)."""
        first = self.start if self.state is None else self.state.length
        if self.num_features <= max(first, length):
            return
        held = np.concatenate(self.features)[: max(0, length - first)]
        self.features = [held] if held.shape[0] else []
        self.num_features = first + held.shape[0] if held.shape[0] or self.state is not None else 0


class DraftEngine:
    """Args:
    drafter: of any kind.
    needs_features: False for a drafter that reads tokens only.
    dtype: of the features.
    """

    def __init__(self, drafter: Drafter, needs_features: bool, dtype: mx.Dtype = mx.float32) -> None:
        self.drafter = drafter
        self.needs_features = needs_features
        self.dtype = dtype
        self._sequences: OrderedDict[RequestId, DraftedSequence] = OrderedDict()
        self._ended: OrderedDict[RequestId, None] = OrderedDict()
        self.target_epoch = 0  # the target whose features are kept

    def reset(self) -> None:
        for request_id in list(self._sequences):
            self._drop(request_id)
        self._ended.clear()
        self.target_epoch = 0

    def use_epoch(self, epoch: int) -> None:
        """Features are those of this target from now on.

        An older one may have sent rows of tokens whose result was lost with it: what is beyond the tokens known to be
        committed is forgotten, and comes again. Rows of committed tokens are the same from every target.
        """
        if epoch == self.target_epoch:
            return
        self.target_epoch = epoch
        for sequence in self._sequences.values():
            sequence.keep_features(len(sequence.tokens))

    def end(self, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            self._drop(request_id)
            self._ended[request_id] = None
        while len(self._ended) > NUM_ENDED_REMEMBERED:
            self._ended.popitem(last=False)

    def _sequence(self, request_id: RequestId) -> DraftedSequence:
        sequence = self._sequences.setdefault(request_id, DraftedSequence())
        self._sequences.move_to_end(request_id)
        if len(self._sequences) > MAX_SEQUENCES:
            self._drop(next(iter(self._sequences)))
        return sequence

    def _drop(self, request_id: RequestId) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None and sequence.state is not None:
            self.drafter.release(sequence.state)

    def take_features(self, rows: FeatureRows, array: Bits) -> None:
        """Rows (n, H) at positions rows.start ..: kept where they continue what is there, trimmed where they repeat it.

        They stay on the host until they are drafted from: then those of all sequences go to the device together. After
        a gap the context begins anew at these rows.
        """
        if rows.request_id in self._ended:
            return
        sequence = self._sequence(rows.request_id)
        end = rows.start + rows.num_rows
        if end <= sequence.num_features:
            return  # a target that started again computes what we have
        if rows.start > sequence.num_features:
            if sequence.state is not None:
                self.drafter.release(sequence.state)
            sequence.state, sequence.features = None, []
            sequence.start = rows.start
        else:
            array = array[sequence.num_features - rows.start :]
        if sequence.state is None and not sequence.features:
            sequence.start = end - array.shape[0]
        sequence.features.append(array)
        sequence.num_features = end

    def take_tokens(self, row: DraftRow) -> None:
        """Committed ids. Only the tail that the scheduler knows we lack is sent; a repeated part is the same."""
        sequence = self._sequence(row.request_id)
        sequence.tokens[row.start :] = row.token_ids
        if row.media:
            sequence.places = self.drafter.places(row.media)

    def is_complete(self, row: DraftRow) -> bool:
        """Whether the features of every position before the anchor have come (those after a gap count)."""
        if not self.needs_features:
            return True
        return self._sequence(row.request_id).num_features >= row.start + len(row.token_ids) - 1

    def draft(self, rows: list[DraftRow]) -> list[Draft]:
        """Drafts for the rows whose context is complete; the others get none. Of rows that want none it is taken in."""
        behind: list[tuple[ContextState, list[Bits], list[int]]] = []
        ready: list[tuple[DraftRow, int, ContextState]] = []
        for row in rows:
            sequence = self._sequence(row.request_id)
            if len(sequence.tokens) == _anchor(row) + 1 and self.is_complete(row):
                state = self._advance(sequence, _anchor(row), behind)
                if state is not None and row.num_tokens > 0:
                    ready.append((row, sequence.tokens[-1], state))
        if behind:
            rows_of = [part for _, parts, _ in behind for part in parts]
            features = from_bits(np.concatenate(rows_of), self.dtype) if rows_of else mx.zeros((0, 0))
            self.drafter.extend_rows([state for state, _, _ in behind], features, [tokens for _, _, tokens in behind])
        ready = [r for r in ready if self.drafter.can_draft(r[2])]
        proposed = self._propose(ready) if ready else {}
        return [
            proposed.get(row.request_id) or Draft(request_id=row.request_id, anchor=_anchor(row), token_ids=[])
            for row in rows
        ]

    def _propose(self, ready: list[tuple[DraftRow, int, ContextState]]) -> dict[RequestId, Draft]:
        """One call of the drafter for (row, anchor token, state) of each; the one wait for the device."""
        rows = [row for row, _, _ in ready]
        num_tokens = min(max(row.num_tokens for row in rows), self.drafter.max_draft_tokens)
        sampler = None
        if any(row.sampling is not None for row in rows):
            sampler = DraftSampler([row.sampling for row in rows], [_anchor(row) + 1 for row in rows])
        result = self.drafter.draft([s for _, _, s in ready], [anchor for _, anchor, _ in ready], num_tokens, sampler)
        mx.eval(result.token_ids, *(sampler.arrays() if sampler is not None else []))
        token_ids = [t[: row.num_tokens] for t, row in zip(to_list(result.token_ids), rows, strict=True)]
        distributions: Sequence[DraftDistribution | None] = [None] * len(rows)
        if sampler is not None:
            distributions = sampler.distributions([len(t) for t in token_ids])
        return {
            row.request_id: Draft(request_id=row.request_id, anchor=_anchor(row), token_ids=tokens, distribution=q)
            for row, tokens, q in zip(rows, token_ids, distributions, strict=True)
        }

    def _advance(
        self, sequence: DraftedSequence, anchor: int, behind: list[tuple[ContextState, list[Bits], list[int]]]
    ) -> ContextState | None:
        """The sequence's state, with what it lacks before the anchor added to `behind`; None where it cannot be had."""
        if self.needs_features:
            # After lost rows the context may begin behind the anchor of an older request: it is left as it is. So is
            # one that has taken more in: the features it would need again are gone.
            first = sequence.start if sequence.state is None else sequence.state.length
            if first > anchor:
                return None
        if sequence.state is None:
            sequence.state = self.drafter.new_state(sequence.start if self.needs_features else 0)
            sequence.state.places = sequence.places
        state = sequence.state
        if state.length > anchor:
            self.drafter.truncate(state, anchor)
        n = anchor - state.length
        if n > 0:
            rows: list[Bits] = []
            if self.needs_features:
                held = sequence.features[0] if len(sequence.features) == 1 else np.concatenate(sequence.features)
                rows, sequence.features = [held[:n]], [held[n:]] if held.shape[0] > n else []
            behind.append((state, rows, sequence.tokens[state.length : anchor]))
        return state


def _anchor(row: DraftRow) -> int:
    return row.start + len(row.token_ids) - 1
