"""What the prefix cache counts since the scheduler's start, and its Prometheus series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from shared import metric_names as names

TIERS = ("device", "host", "ssd")
MISSES = ("unknown", "no_state", "no_window", "load_failed", "slow_archive")


def _zeros(keys: Iterable[str]) -> Counter[str]:
    return Counter(dict.fromkeys(keys, 0))


@dataclass
class PrefixCounts:
    """Outlives the target, and with it the cache itself."""

    query_tokens: int = 0
    hit_tokens: int = 0
    hits_by_tier: Counter[str] = field(default_factory=lambda: _zeros(("device", "archive")))  # tokens
    evictions: int = 0
    archive_errors: int = 0
    misses: Counter[str] = field(default_factory=lambda: _zeros(MISSES))  # lookups that got less than they might have
    checks: Counter[str] = field(default_factory=lambda: _zeros(("equal", "different")))  # blocks computed again
    blocks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    tier_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))


class PrefixCollector(Collector):
    """The series of `counts`, read when the page is made."""

    def __init__(self, counts: PrefixCounts, labels: dict[str, str], registry: CollectorRegistry) -> None:
        self._counts, self._labels = counts, labels
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        counts, plain = self._counts, list(self._labels)
        values = list(self._labels.values())
        for name, text, value in (
            (names.PREFIX_QUERIES, "Prompt tokens looked up in the prefix cache.", counts.query_tokens),
            (names.PREFIX_HITS, "Prompt tokens found in the prefix cache.", counts.hit_tokens),
            (names.PREFIX_EVICTIONS, "Blocks evicted from the device pool.", counts.evictions),
            (names.PREFIX_ARCHIVE_ERRORS, "Archived blocks that could not be written or read.", counts.archive_errors),
        ):
            counter = CounterMetricFamily(name, text, labels=plain)
            counter.add_metric(values, value)
            yield counter
        for name, text, label, by_label in (
            (names.PREFIX_HIT_TOKENS, "Prompt tokens found, by where they lay.", "tier", counts.hits_by_tier),
            (names.PREFIX_MISSES, "Lookups that got less than they might have.", "reason", counts.misses),
            (names.PREFIX_CHECKS, "Blocks of hits that were computed again and compared.", "result", counts.checks),
        ):
            family = CounterMetricFamily(name, text, labels=[*plain, label])
            for key, value in by_label.items():
                family.add_metric([*values, key], value)
            yield family
        for name, text, by_tier in (
            (names.PREFIX_BLOCKS, "Blocks held.", counts.blocks),
            (names.PREFIX_BYTES, "Bytes of blocks and states held.", counts.tier_bytes),
        ):
            gauge = GaugeMetricFamily(name, text, labels=[*plain, "tier"])
            for tier, value in by_tier.items():
                gauge.add_metric([*values, tier], value)
            yield gauge
