"""Rejection sampling against a drafter's own distribution: the emitted token is distributed as the target's.

A draft d drawn from q is kept with chance min(1, p(d) / q(d)); otherwise a token is drawn from max(0, p - q),
normalised. Seen per position this is one draw y from p, coupled to d: y = d where d is kept. So the engine accepts
drafts while they equal the draws, exactly as under the matching rule, and only the way of drawing differs.

Source: Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from shared.messages import DraftDistribution


@dataclass(frozen=True)
class Proposal:
    """A drafted token and what it was drawn from: q of `token_ids`, 0 elsewhere."""

    token_id: int
    token_ids: np.ndarray[tuple[int], np.dtype[np.int32]]  # (width,)
    probabilities: np.ndarray[tuple[int], np.dtype[np.float32]]  # (width,)


def proposals(draft_token_ids: Sequence[int], distribution: DraftDistribution) -> list[Proposal]:
    """One for each drafted token. The scheduler has checked sizes, ids and sums."""
    shape = (len(draft_token_ids), distribution.width)
    ids = np.frombuffer(distribution.token_ids, "<i4").reshape(shape)
    q = np.frombuffer(distribution.probabilities, "<f4").reshape(shape)
    return [Proposal(token, ids[j], q[j]) for j, token in enumerate(draft_token_ids)]


def tried(p: mx.array, drafted: Sequence[Proposal], numbers: Sequence[float]) -> tuple[mx.array, mx.array, mx.array]:
    """Try one draft for each row of p (n, V).

    Args:
        numbers: (n,) uniforms of the accept test, used for nothing else.
    Returns:
        (whether each draft is kept (n,), drafts (n,), what to draw from where it is not (n, V), not normalised).
    """
    width = max(len(d.token_ids) for d in drafted)
    ids = np.zeros((len(drafted), width), np.int32)
    q = np.zeros((len(drafted), width), np.float32)
    for i, d in enumerate(drafted):
        ids[i, : len(d.token_ids)] = d.token_ids
        q[i, : len(d.token_ids)] = d.probabilities
    tokens = np.array([d.token_id for d in drafted], np.int32)
    q_of_draft = np.where(ids == tokens[:, None], q, 0.0).sum(axis=1, dtype=np.float32)
    drafts = mx.array(tokens)
    p_of_draft = mx.take_along_axis(p, drafts[:, None], axis=-1)[:, 0]
    is_kept = mx.array(list(numbers)) * mx.array(q_of_draft) < p_of_draft
    rows = mx.broadcast_to(mx.arange(len(drafted))[:, None], ids.shape)
    left = mx.maximum(p.at[rows, mx.array(ids)].subtract(mx.array(q)), 0.0)
    # Where p and q are equal up to rounding nothing is left, and a draft is rejected with the chance of that rounding.
    left = mx.where(mx.sum(left, axis=-1, keepdims=True) > 0, left, p)
    return is_kept, drafts, left
