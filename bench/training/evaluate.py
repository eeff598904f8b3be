"""Mean acceptance length by simulation: a draft at every anchor of a held-out document, then the walk along it.

The drafts are teacher-forced. That changes nothing: a chain is accepted up to its first wrong token, and up to there
what it feeds itself are the document's own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from bench.training.documents import HELD_OUT, Documents
from bench.training.losses import teaching
from bench.training.parts import Batch, Params, Trained
from bench.training.target import Target

ANCHORS_AT_ONCE = 64
LENGTH_MULTIPLE = 64

Draft = Callable[[Batch], mx.array]
"""Batch -> (B, A, k) bool: whether each draft equals the document's token."""


@dataclass(frozen=True)
class Acceptance:
    """Of a set of documents. A round commits what was accepted and one token of the target."""

    rounds: list[list[int]]  # tokens committed, of each document
    reached: list[int]  # (k,) rounds in which draft j was looked at
    accepted: list[int]  # (k,) and in which it was accepted

    @property
    def mean_length(self) -> float:
        """Tokens over rounds; a document's first token comes with the prefill and is not counted."""
        num_rounds = sum(map(len, self.rounds))
        return sum(map(sum, self.rounds)) / num_rounds if num_rounds else 0.0

    @property
    def mean_of_documents(self) -> float:
        found = [sum(r) / len(r) for r in self.rounds if r]
        return sum(found) / len(found) if found else 0.0

    @property
    def by_position(self) -> list[float]:
        """Chance that draft j is accepted, given that those before it were."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted, self.reached, strict=True)]

    def summary(self) -> dict[str, object]:
        return {
            "mean_acceptance_length": self.mean_length,
            "mean_over_documents": self.mean_of_documents,
            "by_position": self.by_position,
            "num_documents": len(self.rounds),
            "num_tokens": sum(map(sum, self.rounds)),
        }


def walk(matches: np.ndarray, num_tokens: int | None = None) -> tuple[list[int], np.ndarray, np.ndarray]:
    """The rounds of one document.

    Args:
        matches: (n, k) bool; row i is the draft from anchor i, the anchors being all tokens of the answer but the
            last. Draft j of anchor i is token i + 1 + j; what lies behind the document is False.
        num_tokens: drafted each round, k without it.
    Returns:
        tokens committed by each round; (k,) drafts reached; (k,) drafts accepted.
    """
    n, k = matches.shape
    k = k if num_tokens is None else num_tokens
    rounds = []
    reached, accepted = np.zeros(k, dtype=np.int64), np.zeros(k, dtype=np.int64)
    at = 0
    while at < n:
        left = n - at
        row = matches[at, : min(k, left)]
        good = int(np.argmin(row)) if not row.all() else len(row)
        reached[: min(good + 1, len(row))] += 1
        accepted[:good] += 1
        rounds.append(min(good + 1, left))
        at += rounds[-1]
    return rounds, reached, accepted


def drafting(drafter: Trained, params: Params, target: Target, dtype: mx.Dtype) -> Draft:
    head = target.head.astype(dtype)

    def draft(batch: Batch) -> mx.array:
        features = drafter.features(target, batch.tokens)
        rows = drafter.forward(params, batch, features, dtype)
        labels, _, is_valid = teaching(batch, features.final, drafter.num_predictions)
        return (mx.argmax(rows @ head.T, axis=-1) == labels) & (is_valid > 0)

    return draft


def accept(
    draft: Draft, documents: Sequence[np.ndarray], prompts: Sequence[int], k: int, num_tokens: int | None = None
) -> Acceptance:
    """Plays every document; `k` is what `draft` predicts, `num_tokens` what is drafted each round."""
    rounds = []
    width = k if num_tokens is None else num_tokens
    reached, accepted = np.zeros(width, dtype=np.int64), np.zeros(width, dtype=np.int64)
    for document, prompt in zip(documents, prompts, strict=True):
        found = _matches(draft, np.asarray(document), int(prompt), k)
        one, r, a = walk(found, num_tokens)
        rounds.append(one)
        reached += r
        accepted += a
    return Acceptance(rounds, reached.tolist(), accepted.tolist())


def _matches(draft: Draft, document: np.ndarray, prompt: int, k: int) -> np.ndarray:
    """(n, k) for the anchors prompt .. end - 2, one pass with all of them (padded to few shapes)."""
    n = len(document)
    count = n - 1 - prompt
    length = -(-n // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    padded = -(-max(count, 1) // ANCHORS_AT_ONCE) * ANCHORS_AT_ONCE
    tokens = np.zeros((1, length), dtype=np.int32)
    tokens[0, :n] = document
    anchors = np.full((1, padded), max(prompt, 1), dtype=np.int32)
    anchors[0, :count] = prompt + np.arange(count)
    valid = np.zeros_like(anchors)
    valid[0, :count] = np.minimum(n - 1 - anchors[0, :count], k)
    found = draft(Batch(mx.array(tokens), mx.array(anchors), mx.array(valid)))
    return np.array(found)[0, :count]


def held_out(documents: Documents, *, is_greedy: bool, with_loops: bool, limit: int) -> np.ndarray:
    """Indices of the first `limit` held-out documents of a kind: greedy, or of temperature 0.8."""
    mask = documents.split == HELD_OUT
    mask &= (documents.temperatures == 0) if is_greedy else (np.abs(documents.temperatures - 0.8) < 1e-3)
    mask &= documents.lengths - documents.prompts >= 2
    if not with_loops:
        mask &= ~documents.looped
    return np.flatnonzero(mask)[:limit]


def measure(
    draft: Draft, documents: Documents, k: int, num_tokens: int, limit: int, *, is_short: bool = False
) -> dict[str, dict[str, object]]:
    """The held-out sets by name; `is_short`: greedy without loops only."""
    sets = {"greedy": (True, False)}
    if not is_short:
        sets |= {"greedy with loops": (True, True), "temperature 0.8": (False, False)}
    found: dict[str, dict[str, object]] = {}
    for name, (is_greedy, with_loops) in sets.items():
        rows = held_out(documents, is_greedy=is_greedy, with_loops=with_loops, limit=limit)
        if len(rows):
            texts = [documents[int(i)] for i in rows]
            found[name] = accept(draft, texts, documents.prompts[rows].tolist(), k, num_tokens).summary()
    return found
