"""The speculation counters of a metrics page: `vllm:spec_decode_*`, in Tandem and in any server with these names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct, field

_SAMPLE = re.compile(r"^vllm:spec_decode_(?P<name>\w+?)(?:_total)?(?:\{(?P<labels>.*)\})? (?P<value>\S+)(?: \d+)?$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class DraftCounters(Struct, kw_only=True):
    """Counts of one drafter, or of several together."""

    num_drafts: float = 0.0  # verified rows with at least one drafted token
    num_draft_tokens: float = 0.0
    num_accepted_tokens: float = 0.0
    accepted_at: dict[int, float] = field(default_factory=dict)  # position in the draft, from 0 -> accepted tokens

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens that a verified draft gave, the target's own included; None without drafts."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of drafts whose token at each position was accepted (a shorter draft has none there)."""
        last = max((p for p, n in self.accepted_at.items() if n), default=-1)
        return [self.accepted_at.get(p, 0.0) / self.num_drafts for p in range(last + 1)] if self.num_drafts else []

    def since(self, before: DraftCounters) -> DraftCounters:
        return DraftCounters(
            num_drafts=self.num_drafts - before.num_drafts,
            num_draft_tokens=self.num_draft_tokens - before.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens - before.num_accepted_tokens,
            accepted_at={p: n - before.accepted_at.get(p, 0.0) for p, n in self.accepted_at.items()},
        )

    def add(self, other: DraftCounters) -> None:
        self.num_drafts += other.num_drafts
        self.num_draft_tokens += other.num_draft_tokens
        self.num_accepted_tokens += other.num_accepted_tokens
        for position, number in other.accepted_at.items():
            self.accepted_at[position] = self.accepted_at.get(position, 0.0) + number


def parse(page: str) -> dict[str, DraftCounters]:
    """Drafter -> its counters; "" where the server does not say which drafter. Empty: the page has no such counter."""
    found: dict[str, DraftCounters] = {}
    for line in page.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        name, labels, value = sample["name"], dict(_LABEL.findall(sample["labels"] or "")), float(sample["value"])
        if name in _COUNTS:
            counters = found.setdefault(labels.get("drafter", ""), DraftCounters())
            setattr(counters, name, getattr(counters, name) + value)
        elif name == "num_accepted_tokens_per_pos" and labels.get("position", "").isdigit():
            counters = found.setdefault(labels.get("drafter", ""), DraftCounters())
            position = int(labels["position"])
            counters.accepted_at[position] = counters.accepted_at.get(position, 0.0) + value
    return found


def total(by_drafter: Mapping[str, DraftCounters]) -> DraftCounters:
    """All drafters together."""
    together = DraftCounters()
    for counters in by_drafter.values():
        together.add(counters)
    return together
