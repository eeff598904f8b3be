"""The engine's Prometheus page. Counters live here, in the scheduler, so that a worker's restart does not reset
them."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Values

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from scheduler.memory_budget import DEVICE_KINDS
from scheduler.prefix.counts import PrefixCollector, PrefixCounts
from scheduler.sequence import Sequence
from shared import metric_names as names
from shared.messages import Role

MAX_DRAFT_POSITIONS = 32


class WeightedHistogram(Collector):
    """A histogram that takes a value many times at once.

    All rows of a decode step share one gap since their last token; observing it row by row would cost more than
    planning the step.
    """

    def __init__(
        self, name: str, text: str, bounds: Values[float], labels: dict[str, str], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[HistogramMetricFamily]:
        buckets, total = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, self._sum)
        return [family]


class AdapterCollector(Collector):
    """Which LoRA adapters requests run and wait with, in vLLM's form: names in labels, the time as value."""

    def __init__(self, labels: dict[str, str], registry: CollectorRegistry) -> None:
        self.known = 0  # adapters that are served
        self.running: set[str] = set()  # "": the base model
        self.waiting: set[str] = set()
        self._labels = labels
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        info = {
            "max_lora": str(self.known),
            "running_lora_adapters": ",".join(sorted(self.running - {""})),
            "waiting_lora_adapters": ",".join(sorted(self.waiting - {""})),
        }
        text = "Time of this page; the labels name the LoRA adapters that requests run and wait with."
        family = GaugeMetricFamily(names.LORA_REQUESTS_INFO, text, labels=[*self._labels, *info])
        family.add_metric([*self._labels.values(), *info.values()], time.time())
        return [family]


WORKERS = ("target", "drafter", "image")


class Metrics:
    """Every series exists from the start: tools that look for a counter before the first request must find it.

    Args:
        model_name: label of all series; spaces are replaced, since some scrapers split lines at them.
    """

    def __init__(self, model_name: str = "unknown") -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name.replace(" ", "_")
        self._make()

    def _make(self) -> None:
        labels = {"model_name": self._model_name, "engine": "0"}
        plain = list(labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, plain, registry=self.registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, plain, registry=self.registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, plain, registry=self.registry, buckets=buckets).labels(**labels)

        self.running = gauge(names.RUNNING, "Requests in slots.")
        self.waiting = gauge(names.WAITING, "Requests in the queue.")
        self.kv_usage = gauge(names.KV_USAGE, "KV capacity held, 0..1.")
        self.adapters = AdapterCollector(labels, self.registry)
        self.preemptions = counter(names.PREEMPTIONS, "Sequences whose slot was taken, to be recomputed.")
        self.prompt_tokens = counter(names.PROMPT_TOKENS, "Prompt tokens of finished requests.")
        self.prompt_tokens_cached = counter(names.PROMPT_TOKENS_CACHED, "Prompt tokens taken from the prefix cache.")
        self.generation_tokens = counter(names.GENERATION_TOKENS, "Output tokens.")
        self.prefix = PrefixCounts()
        PrefixCollector(self.prefix, labels, self.registry)
        self.ttft = histogram(names.TTFT, "Arrival to first token.", names.TIME_BUCKETS)
        self.itl = WeightedHistogram(
            names.ITL, "Between two outputs of a request.", names.ITL_BUCKETS, labels, self.registry
        )
        self.tpot = histogram(names.TPOT, "Decode time per output token.", names.ITL_BUCKETS)
        self.e2e = histogram(names.E2E, "Arrival to end.", names.LATENCY_BUCKETS)
        self.queue_time = histogram(names.QUEUE_TIME, "Arrival to first step.", names.LATENCY_BUCKETS)
        self.prefill_time = histogram(names.PREFILL_TIME, "First step to first token.", names.LATENCY_BUCKETS)
        self.decode_time = histogram(names.DECODE_TIME, "First token to end.", names.LATENCY_BUCKETS)
        self.request_prompt_tokens = histogram(
            names.REQUEST_PROMPT_TOKENS, "Prompt length of finished requests.", names.COUNT_BUCKETS
        )
        self.request_generation_tokens = histogram(
            names.REQUEST_GENERATION_TOKENS, "Output length of finished requests.", names.COUNT_BUCKETS
        )
        self.iteration_tokens = histogram(names.ITERATION_TOKENS, "Tokens of one step.", names.COUNT_BUCKETS)
        self.batch_occupancy = histogram(names.BATCH_OCCUPANCY, "Decode rows of one step.", names.OCCUPANCY_BUCKETS)

        def counters(name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
            family = Counter(name, text, [*plain, label], registry=self.registry)
            return {value: family.labels(**labels, **{label: value}) for value in values}

        self.request_success = counters(
            names.REQUEST_SUCCESS, "Finished requests.", "finished_reason", ("stop", "length", "abort", "error")
        )
        self.worker_restarts = counters(
            names.WORKER_RESTARTS, "New processes of this role after the first.", "role", WORKERS
        )
        self.resynchronisations = counters(
            names.RESYNCHRONISATIONS, "New epochs of a worker after a lost message.", "role", WORKERS
        )
        self.cancelled = counters(
            names.CANCELLED, "Cancelled requests.", "state", ("waiting", "prefilling", "decoding")
        )
        self.rejected = counters(
            names.REJECTED,
            "Requests not accepted.",
            "reason",
            ("queue_full", "no_target", "too_long", "bad_request", "memory"),
        )
        self.dropped = counters(
            names.DROPPED_MESSAGES, "Bad, truncated or stale messages.", "reason",
            ("bad", "unknown_peer", "old_epoch", "unexpected", "by_peer"),
        )  # fmt: skip
        up = Gauge(names.WORKER_UP, "1 while this worker is ready.", [*plain, "role"], registry=self.registry)
        self.worker_up = {role: up.labels(**labels, role=role) for role in ("target", "drafter")}
        self._memory = Gauge(
            names.MEMORY_BYTES, "Memory of a process.", [*plain, "process", "kind"], registry=self.registry
        )
        self._labels = labels
        self._phases = Histogram(
            names.STEP_PHASE, "Phases of a step in the target.", [*plain, "phase"], registry=self.registry,
            buckets=names.PHASE_BUCKETS,
        )  # fmt: skip
        self.phases = {p: self._phases.labels(**labels, phase=p) for p in ("build", "device", "read", "wait")}
        drafter = [*plain, "drafter"]
        self._spec = {
            name: Counter(name, text, drafter, registry=self.registry)
            for name, text in (
                (names.SPEC_DRAFTS, "Drafts verified."),
                (names.SPEC_DRAFT_TOKENS, "Drafted tokens verified."),
                (names.SPEC_ACCEPTED_TOKENS, "Drafted tokens accepted."),
            )
        }
        self._spec_per_position = Counter(
            names.SPEC_ACCEPTED_PER_POS, "Drafted tokens accepted, by position.", [*drafter, "position"],
            registry=self.registry,
        )  # fmt: skip
        self.feature_bytes = counter(names.FEATURE_BYTES, "Hidden rows sent from the target to the drafter.")
        self.chosen_k = gauge(names.SPEC_CHOSEN_K, "Drafted tokens per row that the policy chooses now.")
        self._round_s = Gauge(
            names.SPEC_ROUND_SECONDS, "What a round takes, as the policy believes.", [*plain, "rows", "k"],
            registry=self.registry,
        )  # fmt: skip
        self._arrival_s = Gauge(
            names.SPEC_ARRIVAL_SECONDS, "What a request that comes costs beside rounds, as the policy believes.",
            [*plain, "drafts"], registry=self.registry,
        )  # fmt: skip
        self._draft_s = histogram(names.DRAFT_SECONDS, "From asking for drafts to having them.", names.PHASE_BUCKETS)
        self.fallthrough = counters(
            names.SPEC_FALLTHROUGH, "Rounds or rows without drafts.", "reason",
            ("timeout", "stale", "no_draft", "bad_token", "bad_distribution"),
        )  # fmt: skip
        self.add_drafter("none")

    def add_drafter(self, drafter: str) -> None:
        """Have the speculation counters at zero for this drafter."""
        for counter in self._spec.values():
            counter.labels(**self._labels, drafter=drafter)
        self._spec_per_position.labels(**self._labels, drafter=drafter, position="0")

    def set_beliefs(self, rounds: Mapping[tuple[int, int], float], arrivals: Mapping[bool, float]) -> None:
        """Args:
        rounds: (rows, k) -> seconds of a round.
        arrivals: with drafts or without -> seconds of a request that comes.
        """
        self._round_s.clear()
        for (rows, k), seconds in rounds.items():
            self._round_s.labels(**self._labels, rows=str(rows), k=str(k)).set(seconds)
        for is_drafting, seconds in arrivals.items():
            self._arrival_s.labels(**self._labels, drafts="yes" if is_drafting else "no").set(seconds)

    def count_fallthrough(self, reason: str) -> None:
        self.fallthrough[reason].inc()

    def draft_seconds(self, seconds: float) -> None:
        self._draft_s.observe(seconds)

    def count_draft(self, drafter: str, num_draft_tokens: int, num_accepted: int) -> None:
        labels = {**self._labels, "drafter": drafter}
        self._spec[names.SPEC_DRAFTS].labels(**labels).inc()
        self._spec[names.SPEC_DRAFT_TOKENS].labels(**labels).inc(num_draft_tokens)
        self._spec[names.SPEC_ACCEPTED_TOKENS].labels(**labels).inc(num_accepted)
        for position in range(min(num_accepted, MAX_DRAFT_POSITIONS)):
            self._spec_per_position.labels(**labels, position=str(position)).inc()

    def set_memory(self, process: str, memory_bytes: dict[str, int]) -> None:
        for kind in {"resident", *DEVICE_KINDS} & memory_bytes.keys():
            self._memory.labels(**self._labels, process=process, kind=kind).set(memory_bytes[kind])

    def set_worker(self, role: Role, is_up: bool) -> None:
        if role in self.worker_up:
            self.worker_up[role].set(1 if is_up else 0)

    def finished(self, sequence: Sequence, now: float) -> None:
        """Histograms of a sequence that ended."""
        assert sequence.finish_reason is not None, "a finished sequence has a reason"
        self.request_success[sequence.finish_reason].inc()
        self.e2e.observe(now - sequence.arrival)
        self.request_prompt_tokens.observe(sequence.num_prompt_tokens)
        self.request_generation_tokens.observe(sequence.num_output_tokens)
        if sequence.first_scheduled is not None and sequence.first_token is not None:
            self.prefill_time.observe(sequence.first_token - sequence.first_scheduled)
            self.decode_time.observe(now - sequence.first_token)
            if sequence.num_output_tokens > 1:
                self.tpot.observe((now - sequence.first_token) / (sequence.num_output_tokens - 1))

    def page(self) -> bytes:
        return generate_latest(self.registry)
