"""The engine's Prometheus page. Counters live here, in the scheduler, so that a worker's restart does not reset them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scheduler.sequence import Sequence
from shared import metric_names as names
from shared.messages import Role

MAX_DRAFT_POSITIONS = 32


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
        self.preemptions = counter(names.PREEMPTIONS, "Sequences whose slot was taken, to be recomputed.")
        self.prompt_tokens = counter(names.PROMPT_TOKENS, "Prompt tokens of finished requests.")
        self.prompt_tokens_cached = counter(names.PROMPT_TOKENS_CACHED, "Prompt tokens taken from the prefix cache.")
        self.generation_tokens = counter(names.GENERATION_TOKENS, "Output tokens.")
        self.prefix_queries = counter(names.PREFIX_QUERIES, "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter(names.PREFIX_HITS, "Prompt tokens found in the prefix cache.")
        self.ttft = histogram(names.TTFT, "Arrival to first token.", names.TIME_BUCKETS)
        self.itl = histogram(names.ITL, "Between two outputs of a request.", names.ITL_BUCKETS)
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

        def labelled(kind: type[Counter] | type[Gauge], name: str, text: str, *more: str) -> Counter | Gauge:
            return kind(name, text, [*plain, *more], registry=self.registry)

        def fill(metric: Counter | Gauge, label: str, values: tuple[str, ...]) -> dict[str, Counter | Gauge]:
            return {value: metric.labels(**labels, **{label: value}) for value in values}

        success = labelled(Counter, names.REQUEST_SUCCESS, "Finished requests by reason.", "finished_reason")
        self.request_success = fill(success, "finished_reason", ("stop", "length", "abort", "error"))
        up = labelled(Gauge, names.WORKER_UP, "1 while this worker is ready.", "role")
        self.worker_up = fill(up, "role", ("target", "drafter"))
        restarts = labelled(Counter, names.WORKER_RESTARTS, "New processes of this role after the first.", "role")
        self.worker_restarts = fill(restarts, "role", ("target", "drafter", "frontend"))
        self._cancelled = labelled(Counter, names.CANCELLED, "Cancelled requests by state.", "state")
        self.cancelled = fill(self._cancelled, "state", ("waiting", "prefilling", "decoding"))
        rejected = labelled(Counter, names.REJECTED, "Requests not accepted.", "reason")
        self.rejected = fill(rejected, "reason", ("queue_full", "no_target", "too_long", "bad_request"))
        dropped = labelled(Counter, names.DROPPED_MESSAGES, "Messages that were bad, truncated or stale.", "reason")
        self.dropped = fill(dropped, "reason", ("bad", "unknown_peer", "old_epoch", "unexpected"))
        self._memory = labelled(Gauge, names.MEMORY_BYTES, "Memory of a process.", "process", "kind")
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
        self.chosen_k = gauge(names.SPEC_CHOSEN_K, "Drafted tokens per row that the policy chooses now.")
        self._draft_s = histogram(names.DRAFT_SECONDS, "From asking for drafts to having them.", names.PHASE_BUCKETS)
        fallthrough = labelled(Counter, names.SPEC_FALLTHROUGH, "Rounds or rows without drafts, by reason.", "reason")
        self.fallthrough = fill(fallthrough, "reason", ("timeout", "stale", "no_draft"))
        self.add_drafter("none")

    def add_drafter(self, drafter: str) -> None:
        """Have the speculation counters at zero for this drafter."""
        for counter in self._spec.values():
            counter.labels(**self._labels, drafter=drafter)
        self._spec_per_position.labels(**self._labels, drafter=drafter, position="0")

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
        for kind, value in memory_bytes.items():
            self._memory.labels(**self._labels, process=process, kind=kind).set(value)

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
