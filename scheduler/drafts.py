"""Drafts as they come from a drafter: checked, since a wrong distribution would change the output silently."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from shared.messages import Draft, DraftDistribution, SamplingParams

MAX_WIDTH = 4096
SUM_TOLERANCE = 1e-3  # of a float32 row


def draws(sampling: SamplingParams) -> bool:
    """Whether drafts for this request are drawn and accepted by rejection sampling.

    Greedy drafts need no distribution. With a client's seed the text must be the same with and without a drafter, so
    there the target draws for itself and accepts what equals its draw.
    """
    return sampling.temperature > 0.0 and not sampling.is_seeded


def problem(draft: Draft, vocab_size: int) -> str | None:
    """Why a draft cannot be used: "bad_token", "bad_distribution" (as they are counted), or None."""
    if any(not 0 <= token < vocab_size for token in draft.token_ids):
        return "bad_token"
    q = draft.distribution
    if q is not None and draft.token_ids and not _is_distribution(draft.token_ids, q, vocab_size):
        return "bad_distribution"
    return None


def _is_distribution(token_ids: list[int], q: DraftDistribution, vocab_size: int) -> bool:
    """Sizes fit, ids exist, rows sum to 1, and each drafted token had a chance."""
    size = 4 * len(token_ids) * q.width
    if not 1 <= q.width <= MAX_WIDTH or len(q.token_ids) != size or len(q.probabilities) != size:
        return False
    ids = np.frombuffer(q.token_ids, "<i4").reshape(len(token_ids), q.width)
    p = np.frombuffer(q.probabilities, "<f4").reshape(len(token_ids), q.width)
    if ids.min() < 0 or ids.max() >= vocab_size or not np.isfinite(p).all() or p.min() < 0:
        return False
    own = np.where(ids == np.array(token_ids)[:, None], p, 0.0).sum(axis=1)
    return bool((np.abs(p.sum(axis=1) - 1.0) < SUM_TOLERANCE).all() and (own > 0).all())


def first(q: DraftDistribution, num_drafts: int) -> DraftDistribution:
    """The rows of the first `num_drafts` drafts."""
    size = 4 * num_drafts * q.width
    return replace(q, token_ids=q.token_ids[:size], probabilities=q.probabilities[:size])
