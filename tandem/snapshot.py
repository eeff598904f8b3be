"""What a server's /health and /metrics tell at one moment, and what changed between two."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import httpx
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from shared import metric_names as names
from tandem.connection import get, health


class Snapshot(Struct, frozen=True):
    """`samples` are a metric's values by the label that tells them apart; values of equal label are added up."""

    at: float  # time.monotonic()
    health: dict[str, Any]
    metrics: dict[str, list[tuple[dict[str, str], float]]]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        wanted = labels.items()
        return sum(value for found, value in self.metrics.get(name, []) if wanted <= found.items())

    def by(self, name: str, label: str) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.metrics.get(name, []):
            sums[labels.get(label, "")] += value
        return dict(sums)


def take(client: httpx.Client) -> Snapshot:
    """Raises:
    Unavailable: no server answers, or it refuses.
    """
    told = health(client)
    metrics: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for family in text_string_to_metric_families(get(client, "/metrics").text):
        for sample in family.samples:
            metrics[sample.name].append((sample.labels, sample.value))
    return Snapshot(time.monotonic(), told, dict(metrics))


class Process(Struct, frozen=True):
    name: str
    state: str
    restarts: int | None  # None: not counted
    memory_bytes: int | None  # None: not told (yet)


class Status(Struct, frozen=True):
    """What `tandem status` shows. Rates are those of `interval_s`, shares those since the server's start."""

    model: str
    url: str
    status: str
    device: str | None
    processes: list[Process]
    num_running: int | None
    num_waiting: int | None
    num_slots: int | None
    kv_usage: float
    interval_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    output_tokens: int
    ttft_ms: float | None  # mean since the start; None: no request yet
    itl_ms: float | None
    acceptance: dict[str, float]  # of each drafter that drafted: accepted tokens / drafted tokens
    draft_tokens: int
    cache_hit_rate: float | None  # cached prompt tokens / prompt tokens
    cache_bytes: dict[str, int]  # by tier


def compare(before: Snapshot, now: Snapshot, url: str) -> Status:
    seconds = max(now.at - before.at, 1e-6)

    def rate(name: str) -> float:
        return max(0.0, now.total(name) - before.total(name)) / seconds  # a restarted scheduler counts anew

    def mean_ms(name: str) -> float | None:
        count = now.total(f"{name}_count")
        return 1e3 * now.total(f"{name}_sum") / count if count else None

    drafted = now.by(f"{names.SPEC_DRAFT_TOKENS}_total", "drafter")
    accepted = now.by(f"{names.SPEC_ACCEPTED_TOKENS}_total", "drafter")
    queries = now.total(f"{names.PREFIX_QUERIES}_total")
    told = now.health
    return Status(
        model=told["model"],
        url=url,
        status=told["status"],
        device=told.get("device"),
        processes=_processes(now),
        num_running=told["num_running"],
        num_waiting=told["num_waiting"],
        num_slots=told.get("num_slots"),
        kv_usage=now.total(names.KV_USAGE),
        interval_s=seconds,
        output_tokens_per_s=rate(f"{names.GENERATION_TOKENS}_total"),
        prompt_tokens_per_s=rate(f"{names.PROMPT_TOKENS}_total"),
        output_tokens=int(now.total(f"{names.GENERATION_TOKENS}_total")),
        ttft_ms=mean_ms(names.TTFT),
        itl_ms=mean_ms(names.ITL),
        acceptance={name: accepted.get(name, 0.0) / count for name, count in drafted.items() if count},
        draft_tokens=int(sum(drafted.values())),
        cache_hit_rate=now.total(f"{names.PREFIX_HITS}_total") / queries if queries else None,
        cache_bytes={tier: int(size) for tier, size in now.by(names.PREFIX_BYTES, "tier").items() if size},
    )


def _processes(now: Snapshot) -> list[Process]:
    memory = now.by(names.MEMORY_BYTES, "process")
    restarts = now.by(f"{names.WORKER_RESTARTS}_total", "role")
    states = {"frontend": "ready", **{role: now.health[role] for role in ("scheduler", "target", "drafter")}}
    return [
        Process(
            name=name,
            state=state,
            restarts=int(restarts[name]) if name in restarts else None,
            memory_bytes=int(memory[name]) if name in memory else None,
        )
        for name, state in states.items()
    ]
