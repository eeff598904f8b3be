"""The scheduler as a pure core: `handle(sender, message, now)` returns what to send. No socket, no clock, no MLX.

Senders and receivers are instance ids of peers. The core is driven by three calls: `handle` for each message, `tick`
now and then (time-outs, lost peers), `shutdown` at the end. Each returns envelopes for the process shell to send.
"""

from __future__ import annotations

import sys
import uuid
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass

import msgspec

from scheduler.media import media_fault
from scheduler.memory_budget import MemoryBudget
from scheduler.metrics import Metrics
from scheduler.peers import Peer, Peers
from scheduler.planner import Plan, Planner
from scheduler.policy import size_of
from scheduler.prefix.cache import PrefixCache
from scheduler.prefix.check import SelfCheck
from scheduler.queue_pace import QueuePace
from scheduler.sequence import Sequence
from scheduler.slots import SlotPool
from scheduler.speculation import Speculator
from scheduler.step_timeout import StepTimeout
from scheduler.suspects import OUTER_DEATH, OWN_DEATH, POISON, RESTART, Suspects, strikes_of
from scheduler.waiting import WaitingQueue
from shared.config import Settings
from shared.errors import Busy, ContextLength, DeadlineExceeded, InvalidRequest, PoisonRequest, Unavailable
from shared.messages import (
    BlocksArchived,
    BlocksLoaded,
    BlockStore,
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
    Outputs,
    Ready,
    Rejected,
    Release,
    RequestId,
    Role,
    RowResult,
    SayHello,
    Step,
    StepResult,
    Submit,
    TokenLogprob,
    Welcome,
    WorkerFailed,
    WorkerInfo,
)

Envelope = tuple[str, Message]

MAX_SLOTS = 1 << 16
MAX_STEPS_IN_FLIGHT = 2  # one runs, one is queued behind it
NGRAM_DRAFT_TOKENS = 7


@dataclass
class InFlight:
    """A step that the target has: whose rows they are, in which incarnation, and when it left."""

    step_id: int
    rows: dict[int, tuple[Sequence, int, int]]  # slot -> (sequence, incarnation, num_drafts), sampled rows only
    sent: float
    k: int  # drafted tokens that were asked for; 0 for a plain step
    batch: int  # decode rows
    width: int  # of the widest decode row
    is_decode_only: bool
    num_tokens: int
    sequences: list[Sequence]  # of all rows


class Core:
    """Args:
    settings: of the process tree.
    metrics: counters; the core only adds to them.
    weights: tenant -> share of the engine, 1 where it is not listed.
    """

    def __init__(self, settings: Settings, metrics: Metrics, weights: Mapping[str, float] | None = None) -> None:
        self.settings = settings
        self.metrics = metrics
        self.scheduler_id = uuid.uuid4().hex
        self.peers = Peers(settings.heartbeat_timeout_s)
        self.waiting = WaitingQueue(weights)
        self.queue_pace = QueuePace()
        self.running: list[Sequence] = []
        self.slots = SlotPool(0, 0, [1])
        self.planner: Planner | None = None  # while a target is ready
        self.prefix: PrefixCache | None = None  # while a target is ready that has one
        self._check: SelfCheck | None = None
        self._requests: dict[RequestId, Sequence] = {}
        self._in_flight: deque[InFlight] = deque()
        self._num_steps = 0
        self._num_arrivals = 0
        self._step_s = 0.0  # moving average, for Retry-After
        self._out: list[Envelope] = []
        self._outputs: dict[str, list[Output]] = {}
        self._freed: list[int] = []
        self._kept: list[BlockStore] = []  # of the freed slots
        self._last_result = 0.0
        self._last_kind: tuple[int, int] | None = None  # (k, batch) of the last result, if that was a decode-only step
        self._roles_seen: set[Role] = set()
        self.suspects = Suspects()
        self.memory = MemoryBudget(settings.memory_limit_bytes or sys.maxsize)
        self.step_timeout = StepTimeout(settings.step_timeout_s)
        self.hung: list[int] = []  # pids of workers to be replaced; the process shell takes them
        self._is_drafted = False  # drafts for the running sequences' present state were asked for
        self.speculator = Speculator(settings.is_ngram, settings.draft_block_size or NGRAM_DRAFT_TOKENS, metrics)
        self.speculator.forced_k = settings.draft_tokens or None

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
                self._heartbeat(sender, message)
            case Ready():
                self._ready(sender, message)
            case Submit():
                self._submit(sender, message, now)
            case Cancel():
                self._cancel(message, now)
            case StepResult():
                self._step_result(sender, message, now)
            case MetricsRequest():
                self._out.append((sender, MetricsPage(query_id=message.query_id, page=self._metrics_page())))
            case CacheRequest():
                self._out.append((sender, self._cache_reply(message)))
            case BlocksLoaded() | BlocksArchived():
                self._archive_message(sender, message)
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
            self._lose(peer, now)
        self._check_step_time(now)
        self.speculator.expire(now)
        for sequence in [s for s in self._requests.values() if _is_overdue(s, now)]:
            self._end(sequence, "error", now, error="the request's time limit passed", code=DeadlineExceeded.code)
        for peer in self.peers.all():
            self._out.append((peer.instance_id, Heartbeat(instance_id=self.scheduler_id)))
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
        self._release_freed()
        self._plan_steps(now)
        for frontend, outputs in self._outputs.items():
            self._out.append((frontend, Outputs(outputs=outputs)))
        self._outputs = {}
        out, self._out = self._out, []
        return out

    # ------------------------------------------------ peers

    def _hello(self, sender: str, hello: Hello, now: float) -> None:
        replaced = self.peers.replaced_by(hello.role, sender)
        if replaced is not None:
            self._lose(replaced, now, strikes_of(hello.last_exit))

        elif sender in self.peers and hello.role != "frontend":
            # The same process says hello again: it forgot, or missed messages.
            self._lose(self.peers.by_id(sender), now, RESTART)
        if hello.role in self._roles_seen and sender not in self.peers and hello.role in self.metrics.worker_restarts:
            self.metrics.worker_restarts[hello.role].inc()
        self._roles_seen.add(hello.role)
        peer = self.peers.add(sender, hello.role, hello.pid, now)
        self._out.append((sender, Welcome(scheduler_id=self.scheduler_id, epoch=peer.epoch)))
        self._broadcast_status()

    def _heartbeat(self, sender: str, message: Heartbeat) -> None:
        peer = self.peers.get(sender)
        if peer is not None:
            self.metrics.set_memory(peer.role, message.memory_bytes)
            self.memory.note(peer.instance_id, message.memory_bytes)
            self.metrics.dropped["by_peer"].inc(max(0, message.num_dropped_messages - peer.num_dropped_messages))
            peer.num_dropped_messages = message.num_dropped_messages
            self.metrics.feature_bytes.inc(max(0, message.num_feature_bytes - peer.num_feature_bytes))
            peer.num_feature_bytes = message.num_feature_bytes

    def _ready(self, sender: str, message: Ready) -> None:
        peer = self.peers.get(sender)
        if peer is None or peer.epoch != message.epoch or peer.role not in ("target", "drafter"):
            self.metrics.dropped["old_epoch"].inc()
            return
        if peer.info is not None:  # a second one would make its slots free while they are used
            if peer.info != message.info:
                self.metrics.dropped["unexpected"].inc()
            return
        if peer.role == "target" and not _is_plausible(message.info):
            self.metrics.dropped["bad"].inc()
            return
        peer.info = message.info
        self.metrics.set_worker(peer.role, True)
        if peer.role == "target":
            info = message.info
            self.slots = SlotPool(info.num_slots, info.kv_capacity_tokens, info.capacity_classes)
            self._num_steps = 0
            self.step_timeout.reset()
            budget = self.settings.max_num_batched_tokens or info.max_step_tokens
            if info.prefix_cache is not None:
                self.prefix = PrefixCache(
                    info.prefix_cache, info.fingerprint, self.metrics.prefix, self.settings.prefix_check_rate
                )
            self.planner = Planner(
                self.waiting, self.running, self.slots, budget, info.max_step_tokens, self.prefix, info.whole_media
            )
            self.speculator.set_target(info.max_draft_tokens, info.step_costs, info.vocab_size, peer.epoch)
        elif message.info.draft_kind is not None:
            info = message.info
            self.speculator.set_drafter(sender, message.info.draft_kind, peer.epoch, info.max_draft_tokens)
        self._broadcast_status()

    def _worker_failed(self, sender: str, now: float) -> None:
        peer = self.peers.get(sender)
        if peer is not None:
            self._lose(peer, now, OWN_DEATH)

    def _lose(self, peer: Peer, now: float, strikes: int = OUTER_DEATH) -> None:
        """A peer is gone. Requests of a lost target wait for the next one; those of a lost frontend end."""
        self.peers.remove(peer.instance_id)
        self.memory.forget(peer.instance_id)
        self.metrics.set_worker(peer.role, False)
        if peer.role == "target":
            self._drop_target(now, strikes)
        elif peer.role == "drafter":
            self.speculator.lose_drafter()
        elif peer.role == "frontend":
            for sequence in [s for s in self._requests.values() if s.frontend == peer.instance_id]:
                self._end(sequence, "abort", now)
        self._broadcast_status()

    def _check_step_time(self, now: float) -> None:
        """A target whose step takes far longer than steps do hangs: it is replaced."""
        target = self.target
        if target is None or not self._in_flight:
            return
        step = self._in_flight[0]
        if now - max(step.sent, self._last_result) > self.step_timeout.limit_s(step.num_tokens):
            self.hung.append(target.pid)
            self._lose(target, now, OWN_DEATH)

    def _resynchronise(self, target: Peer, now: float) -> None:
        """A message to or from the target was lost or came in the wrong place: begin again in a new epoch."""
        self._lose(target, now, RESTART)
        self._out.append((target.instance_id, SayHello()))

    def _drop_target(self, now: float, strikes: int) -> None:
        """Nothing is computed any more: every running sequence waits to be recomputed by the next target.

        Args:
            strikes: how much this says against what the target was working on.
        """
        self.metrics.set_worker("target", False)
        poison = self.suspects.blame((s for step in self._in_flight for s in step.sequences), strikes)
        self._in_flight.clear()
        self._freed.clear()
        self._kept.clear()
        for sequence in self.running:
            sequence.rewind()
            self.waiting.push(sequence)
        for sequence in self._requests.values():
            sequence.was_loaded = False
        self.running.clear()
        self.slots = SlotPool(0, 0, [1])
        self.planner = None
        self.prefix = self._check = None
        self.metrics.prefix.blocks["device"] = self.metrics.prefix.tier_bytes["device"] = 0
        for sequence in poison:
            self._end(sequence, "error", now, error=POISON, code=PoisonRequest.code)

    @property
    def target(self) -> Peer | None:
        return self.peers.by_role("target")

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

    def _broadcast_status(self) -> None:
        status = self.status()
        self._out += [(p.instance_id, status) for p in self.peers.all() if p.role == "frontend"]

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
            self._out.append((sender, rejected))
            return
        self._num_arrivals += 1
        order = (submit.priority * self.settings.priority_ageing_s + now, self._num_arrivals)
        sequence = Sequence(submit=submit, frontend=sender, arrival=now, order=order)
        self._requests[submit.request_id] = sequence
        if sequence.num_output_tokens >= submit.max_tokens:  # resumed after its last token
            self._end(sequence, "length", now)
            return
        self.waiting.push(sequence)

    def _refusal(self, submit: Submit) -> tuple[str, InvalidRequest | Busy | Unavailable] | None:
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
        if any(not 0 <= t < info.vocab_size for t in (*submit.prompt_token_ids, *submit.output_token_ids)):
            return "bad_request", InvalidRequest(f"token ids must lie in 0..{info.vocab_size - 1}")
        if (fault := media_fault(submit, info)) is not None:
            return "bad_request", InvalidRequest(fault)
        total = len(submit.prompt_token_ids) + submit.max_tokens
        if total > info.max_model_len:
            text = f"{len(submit.prompt_token_ids)} prompt tokens and max_tokens {submit.max_tokens} make {total}; "
            return "too_long", ContextLength(text + f"the context holds {info.max_model_len}")
        if self.memory.is_full and not is_resumed:
            text = f"memory is full: {self.memory.used_bytes} of {self.memory.soft_limit_bytes} bytes"
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
            self._emit(sequence, missed, None)
            return
        if sequence.is_running:
            self._preempt(sequence)
        del sequence.token_ids[num_known:]  # their log-probabilities are gone: compute them again

    def _retry_after(self) -> float:
        """Seconds until the queue has probably moved: until the first running request ends, or half the queue is served
        at the pace of late."""
        running = [s for s in self.running if s.finish_reason is None]
        left = min((s.submit.max_tokens - s.num_output_tokens for s in running), default=1)
        return max(1.0, min(60.0, max(left * self._step_s, self.queue_pace.interval_s * len(self.waiting) / 2)))

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
            self._free_slot(sequence, is_suspect=is_suspect)
            self.running.remove(sequence)
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
        )
        self._outputs_of(sequence.frontend).append(output)

    def _free_slot(self, sequence: Sequence, is_suspect: bool = False) -> None:
        assert sequence.slot is not None, "free a slot that is not held"
        if self.prefix is not None:
            if is_suspect:
                self.prefix.drop(sequence)
            elif (store := self.prefix.keep(sequence)) is not None:
                self._kept.append(store)
        self.slots.free(sequence.slot)
        if sequence.is_started:
            self._freed.append(sequence.slot)

    def _release_freed(self) -> None:
        target = self.target
        if self._freed and target is not None:
            release = Release(epoch=target.epoch, slots=self._freed, stores=self._kept, after_step=self._num_steps)
            self._out.append((target.instance_id, release))
        self._freed, self._kept = [], []

    def _emit(self, sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprob] | None) -> None:
        """Tokens of a request that goes on."""
        start = len(sequence.token_ids) - sequence.num_prompt_tokens - len(token_ids)
        output = Output(request_id=sequence.submit.request_id, token_ids=token_ids, logprobs=logprobs, start=start)
        self._outputs_of(sequence.frontend).append(output)

    def _outputs_of(self, frontend: str) -> list[Output]:
        outputs = self._outputs.get(frontend)
        if outputs is None:
            outputs = self._outputs[frontend] = []
        return outputs

    # ------------------------------------------------ steps

    def _plan_steps(self, now: float) -> None:
        target = self.target
        while self.planner is not None and target is not None and len(self._in_flight) < MAX_STEPS_IN_FLIGHT:
            if not self.running and not len(self.waiting):
                self._plan_check(self.planner, target, now)
                return
            self._end_check()
            k = self._draft(now)
            if k is None:
                return
            drafts_for = self.speculator.drafts_for if k else None
            if self.suspects:
                in_flight = (s for step in self._in_flight for s in step.sequences)
                self.planner.suspect = self.suspects.choose(in_flight, self.waiting.peek())
            plan = self.planner.plan(now, drafts_for, self._preempt, self.settings.ttft_bound_s)
            self._release_freed()
            self._send_loads(target)
            if not plan:
                return
            self._is_drafted = False
            self._num_steps += 1
            if k:
                described = map(self.speculator.described, plan.decodes, plan.sequences)  # prefills come last
                plan.decodes = list(described)
            step = Step(
                epoch=target.epoch,
                step_id=self._num_steps,
                starts=plan.starts,
                decodes=plan.decodes,
                encodes=plan.encodes,
                prefills=plan.prefills,
                stores=plan.stores,
            )
            self._in_flight.append(_in_flight(step, plan, now, k))
            self._out.append((target.instance_id, step))
            self.metrics.iteration_tokens.observe(plan.num_tokens)
            if plan.decodes:
                self.metrics.batch_occupancy.observe(len(plan.decodes))

    def _plan_check(self, planner: Planner, target: Peer, now: float) -> None:
        """Nobody wants anything: compute a cached prefix again."""
        prefix = self.prefix
        if prefix is None or self._in_flight:
            return
        if self._check is None and prefix.to_check:
            token_ids, hashes = prefix.to_check.pop()
            capacity = self.slots.class_for(len(token_ids))
            if capacity is not None and self.slots.can_hold(capacity):
                self._check = SelfCheck(self.slots.allocate(capacity), capacity, token_ids, hashes)
        if self._check is None:
            return
        self._num_steps += 1
        chunk = min(planner.max_step_tokens, planner.max_prefill_tokens)
        step = self._check.next_step(target.epoch, self._num_steps, chunk, prefix)
        self._in_flight.append(InFlight(step.step_id, {}, now, 0, 0, 0, False, num_tokens=chunk, sequences=[]))
        self._out.append((target.instance_id, step))
        if self._check.is_done:
            self._end_check()
            self._release_freed()

    def _end_check(self) -> None:
        """It is done, or a request needs the target."""
        if self._check is not None:
            self.slots.free(self._check.slot)
            self._freed.append(self._check.slot)
            self._check = None

    def _draft(self, now: float) -> int | None:
        """Get drafts for the next step; k, or None while the step has to wait for a result or for drafts."""
        if not self.speculator.is_on:
            return 0
        if self.speculator.is_waiting:
            return None
        decoding = [s for s in self.running if s.num_remaining == 1 and s.wants_more]
        k = self.speculator.choose_k(len(decoding))
        if k == 0:
            return 0
        if self._in_flight:
            return None  # drafts need the token before them
        if not self._is_drafted:
            self._is_drafted = True
            request = self.speculator.request(decoding, k, now)
            if request is not None and self.speculator.drafter_id is not None:
                self._out.append((self.speculator.drafter_id, request))
                return None
        return k

    def _draft_reply(self, sender: str, reply: DraftReply, now: float) -> None:
        if sender == self.speculator.drafter_id:
            self.speculator.reply(reply, now)
        else:
            self.metrics.dropped["unexpected"].inc()

    def _preempt(self, sequence: Sequence) -> None:
        self._free_slot(sequence)
        self.running.remove(sequence)
        sequence.rewind()
        sequence.num_preemptions += 1
        self.waiting.push(sequence)
        self.metrics.preemptions.inc()

    def _step_result(self, sender: str, result: StepResult, now: float) -> None:
        target = self.target
        if target is None or sender != target.instance_id or result.epoch != target.epoch:
            self.metrics.dropped["old_epoch"].inc()
            return
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            self.metrics.dropped["unexpected"].inc()
            if any(step.step_id == result.step_id for step in self._in_flight):
                self._resynchronise(target, now)  # the result before it was lost
            return
        step = self._in_flight.popleft()
        if self.prefix is not None and self.prefix.num_checked:
            self.prefix.checked(result.differing)
        self._step_s = 0.9 * self._step_s + 0.1 * (now - step.sent) if self._step_s else now - step.sent
        step_s, elapsed_s = now - max(step.sent, self._last_result), now - self._last_result
        self._last_result = now
        self.step_timeout.observe(step.num_tokens, step_s)
        for phase, seconds in result.phases.items():
            if phase in self.metrics.phases:
                self.metrics.phases[phase].observe(seconds)
        num_tokens = 0
        gaps: dict[float, int] = {}  # when rows had their token before -> how many rows; mostly one entry
        for row in result.rows:
            sequence, incarnation, num_drafts = step.rows.get(row.slot, (None, 0, 0))
            if sequence is None or sequence.incarnation != incarnation or sequence.finish_reason is not None:
                continue
            if (last := sequence.last_token) is not None:
                gaps[last] = gaps.get(last, 0) + 1
                if num_drafts == 0 and self._is_plain(sequence, row):
                    sequence.num_pending -= 1
                    sequence.token_ids.append(row.token_ids[0])
                    sequence.last_token = now
                    num_tokens += 1
                    self._emit(sequence, row.token_ids, row.logprobs)
                    continue
            num_tokens += self._row_result(sequence, row, num_drafts, now)
        if self.suspects:
            self.suspects.clear_proven()
        if step.is_decode_only:
            is_steady = self._last_kind == (step.k, size_of(step.batch))
            self.speculator.stepped(step.batch, step.width, step_s, step.k, num_tokens, elapsed_s, is_steady)
        self._last_kind = (step.k, size_of(step.batch)) if step.is_decode_only else None
        self.metrics.generation_tokens.inc(num_tokens)
        for last_token, count in gaps.items():
            self.metrics.itl.observe(now - last_token, count)

    @staticmethod
    def _is_plain(sequence: Sequence, row: RowResult) -> bool:
        """One more token of a sequence that goes on: the case that `_row_result` would take longest for, all in all."""
        return (
            len(row.token_ids) == 1
            and row.token_ids[0] not in sequence.stop_token_ids
            and len(sequence.token_ids) + 1 < sequence.max_length
            and row.error is None
        )

    def _row_result(self, sequence: Sequence, row: RowResult, num_drafts: int, now: float) -> int:
        """Commit one row's tokens; how many the output took."""
        sequence.num_pending -= 1
        if row.error is not None or not 1 <= len(row.token_ids) <= num_drafts + 1:
            error = row.error or "the target worker sent a malformed result"
            self._end(sequence, "error", now, error=error, is_suspect=True)
            return 0
        if num_drafts:
            # Of the rows that were sent, the rejected drafts are not part of the sequence: roll back.
            num_accepted = len(row.token_ids) - 1
            sequence.num_scheduled -= num_drafts - num_accepted
            if self.prefix is not None and num_accepted < num_drafts:
                self.prefix.forget_state(sequence)
            sequence.num_drafts += 1
            sequence.num_draft_tokens += num_drafts
            sequence.num_accepted_tokens += num_accepted
            self.speculator.verified(sequence, num_drafts, num_accepted)
        kept, reason = self._cut(sequence, row.token_ids)
        sequence.token_ids += kept
        if sequence.first_token is None:
            sequence.first_token = now
            self.metrics.ttft.observe(now - sequence.arrival)
            self.metrics.queue_time.observe((sequence.first_scheduled or now) - sequence.arrival)
            self.metrics.prompt_tokens.inc(sequence.num_prompt_tokens)
            self.metrics.prompt_tokens_cached.inc(sequence.num_cached_tokens)
        sequence.last_token = now
        if reason is not None:
            self._end(sequence, reason, now, token_ids=kept, logprobs=row.logprobs)
        else:
            self._emit(sequence, kept, row.logprobs)
        return len(kept)

    @staticmethod
    def _cut(sequence: Sequence, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """The tokens that belong to the output, up to a stop token or the limit, and whether it ends there."""
        submit = sequence.submit
        for i, token in enumerate(token_ids):
            n = sequence.num_output_tokens + i + 1
            if token in sequence.stop_token_ids and n > submit.min_tokens:
                return token_ids[: i + 1], "stop"
            if n >= submit.max_tokens:
                return token_ids[: i + 1], "length"
        return token_ids, None

    def _send_loads(self, target: Peer) -> None:
        """What sequences wait for comes from the target's archive."""
        if self.prefix is not None and self.prefix.to_load:
            for load in self.prefix.to_load:
                self._out.append((target.instance_id, msgspec.structs.replace(load, epoch=target.epoch)))
            self.prefix.to_load = []

    def _archive_message(self, sender: str, message: BlocksLoaded | BlocksArchived) -> None:
        target = self.target
        if target is None or sender != target.instance_id or message.epoch != target.epoch or self.prefix is None:
            self.metrics.dropped["old_epoch"].inc()
        elif isinstance(message, BlocksArchived):
            self.prefix.archived(message)
        elif not self.prefix.loaded(message):
            self.metrics.dropped["unexpected"].inc()

    def _cache_reply(self, request: CacheRequest) -> CacheReply:
        prefix, target = self.prefix, self.target
        if prefix is None or target is None:
            return CacheReply(query_id=request.query_id, enabled=False)
        num_cleared = 0
        if request.clear:
            num_cleared = prefix.clear()
            self._out.append((target.instance_id, ClearArchive(epoch=target.epoch)))
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
        if self.prefix is not None:
            self.prefix.measure()
        total = self.slots.capacity_tokens
        self.metrics.kv_usage.set(self.slots.used_tokens / total if total else 0.0)
        return self.metrics.page()

    # ------------------------------------------------ invariants

    def check_integrity(self) -> None:
        """Raises AssertionError where our own bookkeeping contradicts itself."""
        self.slots.check_integrity()
        if self.prefix is not None:
            self.prefix.check_integrity()
        live = {id(s) for s in self._requests.values()}
        assert {id(s) for s in self.running} | {id(s) for s in self.waiting} == live, "a live request is nowhere"
        assert all(s.slot is not None and s not in self.waiting for s in self.running), "running without a slot"
        assert all(s.slot is None for s in self.waiting), "waiting with a slot"
        held = [s.slot for s in self.running] + ([self._check.slot] if self._check is not None else [])
        assert len(held) == len(set(held)), "two sequences write to one slot"
        assert len(held) + self.slots.num_free_slots == self.slots.num_slots, "free + used != total"
        drafted = {id(s): n for step in self._in_flight for s, i, n in step.rows.values() if i == s.incarnation}
        for s in self.running:
            # A row with k drafts is scheduled k positions beyond the one token that is certain to come.
            assert s.num_remaining >= -max(0, drafted.get(id(s), 0) - 1), "scheduled beyond the sequence's end"
            assert s.num_scheduled <= s.capacity, "scheduled beyond the slot's capacity"
            assert s.finish_reason is None, "a finished request holds a slot"


def _in_flight(step: Step, plan: Plan, now: float, k: int) -> InFlight:
    rows = {
        row.slot: (sequence, sequence.incarnation, row.num_drafts)
        for row, sequence in zip((*plan.decodes, *plan.prefills), plan.sequences, strict=True)
        if row.is_sampled
    }
    width = max((row.num_drafts + 1 for row in plan.decodes), default=0)
    is_decode_only = not (plan.prefills or plan.encodes)
    return InFlight(
        step.step_id, rows, now, k, len(plan.decodes), width, is_decode_only, plan.num_tokens, plan.sequences
    )


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
    )


def _is_overdue(sequence: Sequence, now: float) -> bool:
    return sequence.submit.timeout_s is not None and now - sequence.arrival > sequence.submit.timeout_s
