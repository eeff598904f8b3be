"""The scheduler as a pure core: `handle(sender, message, now)` returns what to send. No socket, no clock, no MLX.

Senders and receivers are instance ids of peers. The core is driven by three calls: `handle` for each message, `tick`
now and then (time-outs, lost peers), `shutdown` at the end. Each returns envelopes for the process shell to send.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from collections.abc import Sequence as Sequenced

from scheduler.learned import Learned
from scheduler.media import media_fault
from scheduler.memory_budget import MemoryBudget
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope, Outbox
from scheduler.peers import Peer, Peers
from scheduler.queue_pace import QueuePace
from scheduler.sequence import Sequence
from scheduler.session import Session
from scheduler.speculation import Speculator
from scheduler.step_timeout import StepTimeout
from scheduler.suspects import OUTER_DEATH, OWN_DEATH, POISON, RESTART, Suspects, strikes_of
from scheduler.waiting import WaitingQueue
from shared.config import Settings
from shared.errors import Busy, ContextLength, DeadlineExceeded, InvalidRequest, NotFound, PoisonRequest, Unavailable
from shared.messages import (
    BlocksArchived,
    BlocksLoaded,
    CacheReply,
    CacheRequest,
    Cancel,
    ClearArchive,
    DraftReply,
    EngineStatus,
    FinishReason,
    Heartbeat,
    Hello,
    Message,
    MetricsPage,
    MetricsRequest,
    Output,
    Ready,
    Rejected,
    RequestId,
    Role,
    SayHello,
    StepResult,
    Submit,
    Timings,
    TokenLogprob,
    Verified,
    Welcome,
    WorkerFailed,
    WorkerInfo,
)

MAX_SLOTS = 1 << 16
MAX_DRAFT_TOKENS = 1 << 10
NGRAM_DRAFT_TOKENS = 7


class Core:
    """Args:
    settings: of the process tree.
    metrics: counters; the core only adds to them.
    weights: tenant -> share of the engine, 1 where it is not listed.
    known: what speculation learned before, by pair of models and device; it is put there, too.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        weights: Mapping[str, float] | None = None,
        known: dict[str, Learned] | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.scheduler_id = uuid.uuid4().hex
        self.peers = Peers(settings.heartbeat_timeout_s)
        self.waiting = WaitingQueue(weights)
        self.queue_pace = QueuePace()
        self.session: Session | None = None  # while a target is ready
        self._requests: dict[RequestId, Sequence] = {}
        self._num_arrivals = 0
        self._outbox = Outbox()
        self._step_timeout = StepTimeout(settings.step_timeout_s)
        self._timed = ""  # the target process whose steps it knows: a new epoch of the same one changes nothing
        self._last_process: dict[Role, str] = {}  # role -> instance id of its newest process
        self._fingerprint = ""  # of the last target's weights
        self.suspects = Suspects()
        self.memory = MemoryBudget(settings.memory_limit_bytes or sys.maxsize, settings.memory_hard_limit_bytes)
        self.hung: list[int] = []  # pids of workers to be replaced; the process shell takes them
        self.speculator = Speculator(settings.is_ngram, settings.draft_block_size or NGRAM_DRAFT_TOKENS, metrics, known)
        self.speculator.forced_k = settings.draft_tokens or None
        self.speculator.max_batch = settings.draft_max_batch

    # ------------------------------------------------ entry points

    def handle(self, sender: str, message: Message, now: float) -> list[Envelope]:
        """Advance on one message from `sender`."""
        peer = self.peers.seen(sender, now)
        if peer is None and not isinstance(message, Hello):
            self.metrics.dropped["unknown_peer"].inc()
            return [(sender, SayHello())]
        match message:
            case Hello():
                self._hello(sender, message, now)
            case Heartbeat():
                self._heartbeat(sender, message, now)
            case Ready():
                self._ready(sender, message, now)
            case Submit():
                self._submit(sender, message, now)
            case Cancel():
                self._cancel(message, now)
            case StepResult():
                self._step_result(sender, message, now)
            case MetricsRequest():
                self._outbox.send(sender, MetricsPage(query_id=message.query_id, page=self._metrics_page()))
            case CacheRequest():
                self._outbox.send(sender, self._cache_reply(message))
            case BlocksLoaded() | BlocksArchived():
                self._archive_message(sender, message, now)
            case WorkerFailed():
                self._worker_failed(sender, now)
            case DraftReply():
                self._draft_reply(sender, message, now)
            case _:
                self.metrics.dropped["unexpected"].inc()
        return self._finish(now)

    def tick(self, now: float) -> list[Envelope]:
        """Time-outs: silent peers, requests past their deadline. Sends heartbeats and the status."""
        for peer in self.peers.lost(now):
            self._lose(peer, now, is_silent=True)
        self._check_step_time(now)
        if self.target is not None and self.session is not None and self.session.has_lost_load(now):
            self._resynchronise(self.target, now)
        self.speculator.expire(now)
        for sequence in [s for s in self._requests.values() if _is_overdue(s, now)]:
            self._end(sequence, "error", now, error="the request's time limit passed", code=DeadlineExceeded.code)
        self._relieve_memory(now)
        for peer in self.peers.all():
            self._outbox.send(peer.instance_id, Heartbeat(instance_id=self.scheduler_id))
        self._broadcast_status()
        return self._finish(now)

    @property
    def deadline(self) -> float | None:
        """When `wake` wants to be called, if nothing else happens before."""
        return self.speculator.deadline

    def wake(self, now: float) -> list[Envelope]:
        """A deadline has passed."""
        self.speculator.expire(now)
        return self._finish(now)

    def work_ahead(self) -> bool:
        """A little of what a later message will need, for when none waits. False where nothing is left to do."""
        return self.session is not None and self.speculator.is_on and self.speculator.index_ahead(self.session.running)

    def lose(self, instance_id: str, now: float) -> list[Envelope]:
        """A peer cannot be reached any more."""
        peer = self.peers.get(instance_id)
        if peer is not None:
            self._lose(peer, now)
        return self._finish(now)

    def shutdown(self, now: float) -> list[Envelope]:
        """End every live request with a clear error."""
        for sequence in list(self._requests.values()):
            self._end(sequence, "error", now, error="the server is shutting down")
        return self._finish(now)

    def _finish(self, now: float) -> list[Envelope]:
        """After any event: tell the target what is free, plan steps, and hand out all that is to be sent."""
        if self.session is not None:
            self.session.plan_steps(now)
        return self._outbox.take()

    # ------------------------------------------------ peers

    def _hello(self, sender: str, hello: Hello, now: float) -> None:
        replaced = self.peers.replaced_by(hello.role, sender)
        if replaced is not None:
            self._lose(replaced, now, strikes_of(hello.last_exit))

        elif sender in self.peers and hello.role != "frontend":
            # The same process says hello again: it forgot, or missed messages.
            self._lose(self.peers.by_id(sender), now, RESTART)
            self.metrics.resynchronisations[hello.role].inc()
        elif hello.role == "target" and sender != self._last_process.get("target"):
            self._fail_poison(self.suspects.explain(hello.last_exit), now)
        if self._last_process.get(hello.role, sender) != sender and hello.role in self.metrics.worker_restarts:
            self.metrics.worker_restarts[hello.role].inc()
        self._last_process[hello.role] = sender
        peer = self.peers.add(sender, hello.role, hello.pid, now)
        self._outbox.send(sender, Welcome(scheduler_id=self.scheduler_id, epoch=peer.epoch))
        self._broadcast_status()

    def _heartbeat(self, sender: str, message: Heartbeat, now: float) -> None:
        peer = self.peers.get(sender)
        if peer is not None:
            self.metrics.set_memory(peer.role, message.memory_bytes)
            self.memory.note(peer.instance_id, message.memory_bytes)
            self.metrics.dropped["by_peer"].inc(max(0, message.num_dropped_messages - peer.num_dropped_messages))
            peer.num_dropped_messages = message.num_dropped_messages
            self.metrics.feature_bytes.inc(max(0, message.num_feature_bytes - peer.num_feature_bytes))
            peer.num_feature_bytes = message.num_feature_bytes
            step = self.session.oldest_step if self.session is not None and peer.role == "target" else 0
            if peer.role != "frontend" and peer.has_lost(message, step, now):
                self._resynchronise(peer, now)

    def _ready(self, sender: str, message: Ready, now: float) -> None:
        peer = self.peers.get(sender)
        if peer is None or peer.epoch != message.epoch or peer.role not in ("target", "drafter"):
            self.metrics.dropped["old_epoch"].inc()
            return
        if peer.info is not None:  # a second one would make its slots free while they are used
            if peer.info != message.info:
                self.metrics.dropped["unexpected"].inc()
            return
        if not (_is_plausible(message.info) if peer.role == "target" else _drafts_plausibly(message.info)):
            self.metrics.dropped["bad"].inc()
            return
        peer.info = message.info
        self.metrics.set_worker(peer.role, True)
        if peer.role == "target":
            info = message.info
            self._check_weights(info, now)
            if sender != self._timed:
                self._step_timeout, self._timed = StepTimeout(self.settings.step_timeout_s), sender
            self.session = Session(
                sender, peer.epoch, info, self.settings, self.metrics, self.waiting, self.speculator, self.suspects,
                self._step_timeout, self._outbox, self._end,
            )  # fmt: skip
            self.speculator.set_target(
                info.max_draft_tokens,
                info.step_costs,
                info.vocab_size,
                peer.epoch,
                info.packs_rows,
                name=f"{info.fingerprint} {info.dtype} {info.device}",
            )
        elif message.info.draft_kind is not None:
            info = message.info
            self.speculator.set_drafter(
                sender, message.info.draft_kind, peer.epoch, info.max_draft_tokens, info.step_costs, name=info.model
            )
        self._broadcast_status()

    def _check_weights(self, info: WorkerInfo, now: float) -> None:
        """Requests that other weights have begun are not continued by these: the text would be neither's."""
        if self._fingerprint not in ("", info.fingerprint):
            for sequence in list(self._requests.values()):
                self._end(sequence, "error", now, error="the model was changed while the request was running")
        self._fingerprint = info.fingerprint

    def _worker_failed(self, sender: str, now: float) -> None:
        peer = self.peers.get(sender)
        if peer is not None:
            self._lose(peer, now, OWN_DEATH)

    def _lose(self, peer: Peer, now: float, strikes: int = OUTER_DEATH, is_silent: bool = False) -> None:
        """A peer is gone. Requests of a lost target wait for the next one; those of a lost frontend end."""
        self.peers.remove(peer.instance_id)
        self.memory.forget(peer.instance_id)
        self.metrics.set_worker(peer.role, False)
        if peer.role == "target":
            self._drop_target(now, strikes, is_silent)
        elif peer.role == "drafter":
            self.speculator.lose_drafter()
        elif peer.role == "frontend":
            for sequence in [s for s in self._requests.values() if s.frontend == peer.instance_id]:
                self._end(sequence, "abort", now)
        self._broadcast_status()

    def _relieve_memory(self, now: float) -> None:
        """Beyond the soft limit caches shrink and nobody gets a slot. Beyond the hard one the newest loses its slot.

        One at a time, so that what it gave back is seen before the next one goes.
        """
        session = self.session
        if session is None:
            return
        session.planner.is_short = self.memory.is_full
        if self.memory.is_full and self.memory.take_news(session.target_id):
            is_preempted = self.memory.is_overfull and session.preempt_newest()
            session.shrink(now, at_once=is_preempted)

    def _check_step_time(self, now: float) -> None:
        """A target whose step takes far longer than steps do hangs: it is replaced."""
        target = self.target
        if target is not None and self.session is not None and self.session.is_hung(now):
            self.hung.append(target.pid)
            self._lose(target, now, OWN_DEATH)

    def _resynchronise(self, worker: Peer, now: float) -> None:
        """A message to or from a worker was lost or came in the wrong place: begin again in a new epoch."""
        self._lose(worker, now, RESTART)
        self.metrics.resynchronisations[worker.role].inc()
        self._outbox.send(worker.instance_id, SayHello())

    def _drop_target(self, now: float, strikes: int, is_silent: bool) -> None:
        """Nothing is computed any more.

        Args:
            strikes: how much this says against what the target was working on.
            is_silent: only missing heartbeats tell of it.
        """
        self.metrics.set_worker("target", False)
        session, self.session = self.session, None
        for sequence in self._requests.values():
            sequence.was_loaded = False
        if session is not None:
            self._fail_poison(session.close(strikes, is_silent), now)

    def _fail_poison(self, sequences: Sequenced[Sequence], now: float) -> None:
        for sequence in sequences:
            self._end(sequence, "error", now, error=POISON, code=PoisonRequest.code)

    @property
    def target(self) -> Peer | None:
        return self.peers.by_role("target")

    @property
    def running(self) -> list[Sequence]:
        """Sequences with a slot."""
        return self.session.running if self.session is not None else []

    def status(self) -> EngineStatus:
        target, drafter = self.target, self.peers.by_role("drafter")
        return EngineStatus(
            scheduler_id=self.scheduler_id,
            target=target.state if target else "absent",
            drafter=drafter.state if drafter else "absent",
            target_info=target.info if target else None,
            drafter_info=drafter.info if drafter else None,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
        )

    def timings(self, request_id: RequestId, now: float) -> Timings | None:
        """Of a live request so far; None where there is none of this name."""
        sequence = self._requests.get(request_id)
        return sequence.timings(now) if sequence is not None else None

    def _broadcast_status(self) -> None:
        status = self.status()
        for peer in self.peers.all():
            if peer.role == "frontend":
                self._outbox.send(peer.instance_id, status)

    # ------------------------------------------------ requests

    def _submit(self, sender: str, submit: Submit, now: float) -> None:
        known = self._requests.get(submit.request_id)
        if known is not None and known.frontend == sender:
            self._catch_up(known, submit)
            return
        refusal = self._refusal(submit)
        if refusal is not None:
            reason, error = refusal
            self.metrics.rejected[reason].inc()
            rejected = Rejected(
                request_id=submit.request_id,
                code=error.code,
                message=error.message,
                retry_after_s=error.retry_after_s,
            )
            self._outbox.send(sender, rejected)
            return
        self._num_arrivals += 1
        order = (submit.priority * self.settings.priority_ageing_s + now, self._num_arrivals)
        sequence = Sequence(submit=submit, frontend=sender, arrival=now, order=order)
        self._requests[submit.request_id] = sequence
        if sequence.num_output_tokens >= submit.max_tokens:  # resumed after its last token
            self._end(sequence, "length", now)
            return
        self.waiting.push(sequence)

    def _refusal(self, submit: Submit) -> tuple[str, InvalidRequest | NotFound | Busy | Unavailable] | None:
        info = self.target.info if self.target else None
        is_resumed = submit.is_resumed or bool(submit.output_token_ids)
        if submit.request_id in self._requests:
            return "bad_request", InvalidRequest(f"request id {submit.request_id} is already running")
        if not submit.prompt_token_ids or submit.max_tokens < 1:
            return "bad_request", InvalidRequest("a request needs at least one prompt token and one output token")
        if info is None:
            if is_resumed:  # accepted before this scheduler started: it waits for the target
                return None
            return "no_target", Unavailable("the model is not ready", retry_after_s=5.0)
        token_ids = submit.prompt_token_ids + submit.output_token_ids
        if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
            return "bad_request", InvalidRequest(f"token ids must lie in 0..{info.vocab_size - 1}")
        if submit.pooling is not None and not info.embedding_size:
            return "bad_request", InvalidRequest(f"the hidden rows of {info.architecture} cannot be seen")
        if submit.pooling is not None and (submit.max_tokens != 1 or submit.output_token_ids):
            return "bad_request", InvalidRequest("a pooled request has no output")
        if submit.adapter and submit.adapter not in info.adapters:
            return "bad_request", NotFound(f"no adapter {submit.adapter!r} here", param="model")
        if (fault := media_fault(submit, info)) is not None:
            return "bad_request", InvalidRequest(fault)
        total = len(submit.prompt_token_ids) + submit.max_tokens
        if total > info.max_model_len:
            text = f"{len(submit.prompt_token_ids)} prompt tokens and max_tokens {submit.max_tokens} make {total}; "
            return "too_long", ContextLength(text + f"the context holds {info.max_model_len}")
        if self.memory.is_full and not is_resumed:
            text = f"memory is full: {self.memory}"
            return "memory", Busy(text, retry_after_s=self._retry_after())
        limit = self.settings.max_queue
        if len(self.waiting) >= limit and not is_resumed and self.waiting.is_over_share(submit.tenant, limit):
            text = f"{len(self.waiting)} requests are waiting already"
            return "queue_full", Busy(text, retry_after_s=self._retry_after())
        return None

    def _catch_up(self, sequence: Sequence, submit: Submit) -> None:
        """A Submit of a live request: it was repeated on its way, or its frontend missed Outputs after these tokens."""
        num_known = sequence.num_prompt_tokens + len(submit.output_token_ids)
        missed = sequence.token_ids[num_known:]
        if sequence.token_ids[:num_known] != [*submit.prompt_token_ids, *submit.output_token_ids] or not missed:
            return
        if submit.sampling.num_logprobs is None:
            self._outbox.emit(sequence, missed, None, is_repeated=True)
            return
        if sequence.is_running and self.session is not None:
            self.session.preempt(sequence)
        del sequence.token_ids[num_known:]  # their log-probabilities are gone: compute them again

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved: until the first running request ends, or half the queue is served
        at the pace of late."""
        step_s = self.session.step_s if self.session is not None else 0.0
        running = [s for s in self.running if s.finish_reason is None]
        left = min((s.submit.max_tokens - s.num_output_tokens for s in running), default=1)
        return max(1.0, min(60.0, max(left * step_s, self.queue_pace.interval_s * len(self.waiting) / 2)))

    def _cancel(self, message: Cancel, now: float) -> None:
        sequence = self._requests.get(message.request_id)
        if sequence is None:
            return  # it ended while the message was on its way
        state = "waiting" if not sequence.is_running else "decoding" if sequence.first_token else "prefilling"
        if message.reason == "stop_string":
            self._end(sequence, "stop", now)
        else:
            self.metrics.cancelled[state].inc()
            self._end(sequence, "abort", now)

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now: float,
        error: str | None = None,
        token_ids: Sequenced[int] = (),
        logprobs: list[TokenLogprob] | None = None,
        code: str | None = None,
        is_suspect: bool = False,
        verified: Verified | None = None,
        embedding: bytes | None = None,
    ) -> None:
        """The one place where a request ends: its slot is free, its terminal output (with its last tokens) leaves.

        Args:
            is_suspect: what the sequence computed must not be reused.
        """
        assert sequence.finish_reason is None, "a request ends once"
        sequence.finish_reason = reason
        del self._requests[sequence.submit.request_id]
        self.speculator.end(sequence)
        self.suspects.remove(sequence)
        self.waiting.settle(sequence)
        self.queue_pace.ended(now, len(self.waiting))
        if sequence.slot is not None:
            assert self.session is not None, "a slot of no target"
            self.session.free_slot(sequence, is_suspect)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.metrics.finished(sequence, now)
        output = Output(
            request_id=sequence.submit.request_id,
            token_ids=list(token_ids),
            logprobs=logprobs[: len(token_ids)] if logprobs is not None else None,
            finish_reason=reason,
            error=error,
            timings=sequence.timings(now),
            start=sequence.num_output_tokens - len(token_ids),
            error_code=code,
            verified=verified,
            embedding=embedding,
        )
        self._outbox.put(sequence.frontend, output)

    # ------------------------------------------------ what workers send

    def _session_of(self, sender: str, epoch: int) -> Session | None:
        """The session that a target's message belongs to; one of an older target is counted and dropped."""
        session = self.session
        if session is not None and sender == session.target_id and epoch == session.epoch:
            return session
        self.metrics.dropped["old_epoch"].inc()
        return None

    def _step_result(self, sender: str, result: StepResult, now: float) -> None:
        session, target = self._session_of(sender, result.epoch), self.target
        if session is not None and target is not None and not session.result(result, now):
            self._resynchronise(target, now)

    def _archive_message(self, sender: str, message: BlocksLoaded | BlocksArchived, now: float) -> None:
        session = self._session_of(sender, message.epoch)
        if session is not None:
            session.archive_message(message, now)

    def _draft_reply(self, sender: str, reply: DraftReply, now: float) -> None:
        if sender == self.speculator.drafter_id:
            self.speculator.reply(reply, now)
        else:
            self.metrics.dropped["unexpected"].inc()

    # ------------------------------------------------ what frontends ask

    def _cache_reply(self, request: CacheRequest) -> CacheReply:
        session = self.session
        prefix = session.prefix if session is not None else None
        if session is None or prefix is None:
            return CacheReply(query_id=request.query_id, enabled=False)
        num_cleared = 0
        if request.clear:
            num_cleared = prefix.clear()
            self._outbox.send(session.target_id, ClearArchive(epoch=session.epoch))
        prefix.measure()
        counts = self.metrics.prefix
        return CacheReply(
            query_id=request.query_id,
            enabled=True,
            block_size=prefix.info.block_size,
            blocks=counts.blocks,
            tier_bytes=counts.tier_bytes,
            capacity_blocks=prefix.info.num_blocks,
            query_tokens=counts.query_tokens,
            hit_tokens=counts.hit_tokens,
            evictions=counts.evictions,
            misses=dict(counts.misses),
            checks=dict(counts.checks),
            cleared_blocks=num_cleared,
        )

    def _metrics_page(self) -> bytes:
        self.metrics.running.set(len(self.running))
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.chosen_k.set(self.speculator.choose_k(len(self.running)))
        self.metrics.set_beliefs(*self.speculator.policy.beliefs())
        session = self.session
        total = session.slots.capacity_tokens if session is not None else 0
        self.metrics.kv_usage.set(session.slots.used_tokens / total if session is not None and total else 0.0)
        if session is not None and session.prefix is not None:
            session.prefix.measure()
        self.metrics.adapters.known = len(self.target.info.adapters) if self.target and self.target.info else 0
        self.metrics.adapters.running = {s.submit.adapter for s in self.running}
        self.metrics.adapters.waiting = {s.submit.adapter for s in self.waiting}
        return self.metrics.page()

    # ------------------------------------------------ invariants

    def check_integrity(self) -> None:
        """Raises AssertionError where our own bookkeeping contradicts itself."""
        if self.session is not None:
            self.session.check_integrity()
        live = {id(s) for s in self._requests.values()}
        assert {id(s) for s in self.running} | {id(s) for s in self.waiting} == live, "a live request is nowhere"
        assert all(s.slot is None for s in self.waiting), "waiting with a slot"


def _is_plausible(info: WorkerInfo) -> bool:
    """Whether slots and capacities can be what a target has: planning relies on it."""
    classes = info.capacity_classes
    return (
        1 <= info.num_slots <= MAX_SLOTS
        and bool(classes)
        and classes == sorted(set(classes))
        and classes[0] >= 1
        and info.kv_capacity_tokens >= classes[-1] >= info.max_model_len >= 1
        and info.max_step_tokens >= 1
        and info.vocab_size >= 1
        and _drafts_plausibly(info)
    )


def _drafts_plausibly(info: WorkerInfo) -> bool:
    """Whether a draft, or what is verified of one, can be that long: a rate is kept for each of its places."""
    return 0 <= info.max_draft_tokens <= MAX_DRAFT_TOKENS


def _is_overdue(sequence: Sequence, now: float) -> bool:
    return sequence.submit.timeout_s is not None and now - sequence.arrival > sequence.submit.timeout_s
