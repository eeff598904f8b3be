"""Drafts drawn at random, with the exact distribution that they were drawn from.

The request's own temperature, bias and filters shape q as they shape the target's p, so that the two are alike. q is
cut to its most likely tokens *before* the draw: what is sent is what was drawn from; anything else would bias the text.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import msgspec
import numpy as np

from shared.messages import DraftDistribution, SamplingParams
from workers.sampling.sampler import SampledRow, SlotSampling, adjust, draw_index, probabilities
from workers.sampling.uniform import DRAFT, uniform

MAX_CANDIDATES = 64  # tokens of one q: 512 bytes on the wire, and seldom less than 0.9 of the mass at temperature 1

_GREEDY = SamplingParams(temperature=0.0)


class DraftSampler:
    """A `Sampler` for one batch: draws for rows with parameters, takes the most likely token for the others.

    Args:
        params: for each row, or None for a greedy row.
        positions: for each row that of its first draft; uniforms are keyed by position.
    """

    def __init__(self, params: Sequence[SamplingParams | None], positions: Sequence[int]) -> None:
        self._params = [_GREEDY if p is None else _without_penalties(p) for p in params]
        self._positions = list(positions)
        self._is_drawn = [p is not None for p in params]
        self._ids: list[mx.array] = []  # (B, width) for each step
        self._q: list[mx.array] = []

    def __call__(self, logits: mx.array, step: int) -> mx.array:
        """(B, V) over the target's vocabulary -> (B,) token ids; nothing is evaluated."""
        vocab_size = logits.shape[-1]
        rows = [
            SampledRow(SlotSampling(p, vocab_size), at + step)
            for p, at in zip(self._params, self._positions, strict=True)
        ]
        logits = adjust(logits.astype(mx.float32), rows)
        width = min(MAX_CANDIDATES, vocab_size)
        ids = mx.argpartition(-logits, kth=width - 1, axis=-1)[:, :width].astype(mx.int32)
        top = mx.take_along_axis(logits, ids, axis=-1)
        q = probabilities(top, rows)
        numbers = mx.array([uniform(r.state.params.seed, r.position, DRAFT) for r in rows])
        index = mx.where(mx.array(self._is_drawn), draw_index(q, numbers), mx.argmax(top, axis=-1).astype(mx.int32))
        self._ids.append(ids)
        self._q.append(q)
        return mx.take_along_axis(ids, index[:, None], axis=-1)[:, 0]

    def arrays(self) -> list[mx.array]:
        """What to evaluate together with the drafts."""
        return [*self._ids, *self._q]

    def distributions(self, num_tokens: Sequence[int]) -> list[DraftDistribution | None]:
        """For each row that of its first num_tokens[b] drafts; None for a greedy one. Waits for the device."""
        ids = np.stack([np.array(a) for a in self._ids], axis=1).astype("<i4")
        q = np.stack([np.array(a) for a in self._q], axis=1).astype("<f4")
        return [
            DraftDistribution(width=ids.shape[2], token_ids=ids[b, :n].tobytes(), probabilities=q[b, :n].tobytes())
            if self._is_drawn[b]
            else None
            for b, n in enumerate(num_tokens)
        ]


def _without_penalties(params: SamplingParams) -> SamplingParams:
    """The drafter does not count tokens; the target's p does, and rejection sampling makes up for the difference."""
    return msgspec.structs.replace(params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
