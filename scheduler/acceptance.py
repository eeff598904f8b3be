"""How likely drafts are to be accepted, by their place behind the last token."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.learned import MAX_REMEMBERED_ROWS, LearnedAcceptance

PRIOR = 0.8  # acceptance assumed before anything was seen: hopeful, so that it is measured at once
ACCEPT_WEIGHT = 0.004  # of one verified row in the moving average of acceptance
LIKE_BEFORE = 16  # tests of a position that weigh as much as what is known of the one before it


class AcceptanceRates:
    """Moving averages of the chance that draft j (0-based) is accepted once those before it were."""

    def __init__(self, max_draft_tokens: int) -> None:
        self._rates = [PRIOR] * max(1, max_draft_tokens)
        self._seen = [0] * max(1, max_draft_tokens)
        self._expected: list[float] = []  # by the number of drafts; empty: to be computed

    def learned(self) -> list[LearnedAcceptance]:
        return [LearnedAcceptance(rate, seen) for rate, seen in zip(self._rates, self._seen, strict=True)]

    def recall(self, learned: Sequence[LearnedAcceptance]) -> None:
        """What was seen before the start, as a few rows of now."""
        self._expected = []
        for j, known in enumerate(learned[: len(self._rates)]):
            self._rates[j], self._seen[j] = known.rate, min(known.seen, MAX_REMEMBERED_ROWS)

    def add(self, num_drafts: int, num_accepted: int) -> None:
        self._expected = []
        for j in range(min(num_drafts, num_accepted + 1, len(self._rates))):
            self._seen[j] += 1
            weight = max(ACCEPT_WEIGHT, 1 / (self._seen[j] + 1))
            self._rates[j] += weight * ((1.0 if j < num_accepted else 0.0) - self._rates[j])

    def expected_tokens(self, num_drafts: int) -> float:
        """Tokens that one row commits per step: 1 + a1 + a1 a2 + ...

        A position that was seldom tested counts as like the one before it.
        """
        if not self._expected:
            self._expected = self._by_number()
        return self._expected[min(num_drafts, len(self._rates))]

    def _by_number(self) -> list[float]:
        totals, chance, before = [1.0], 1.0, self._rates[0]
        for rate, seen in zip(self._rates, self._seen, strict=True):
            seen = min(seen, round(1 / ACCEPT_WEIGHT))
            before = (seen * rate + LIKE_BEFORE * before) / (seen + LIKE_BEFORE)
            chance *= before
            totals.append(totals[-1] + chance)
        return totals
