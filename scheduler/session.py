"""One target from its Ready to its loss: slots, planning, the steps it has, its prefix cache.

All that a lost target takes with it lives here; the core makes a new session for the next one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence as Sequenced
from dataclasses import dataclass
from typing import Protocol

import msgspec

from scheduler.look_ahead import LookAhead
from scheduler.metrics import Metrics
from scheduler.outbox import Outbox
from scheduler.planner import Plan, Planner
from scheduler.policy import size_of
from scheduler.prefix.cache import PrefixCache
from scheduler.prefix.check import SelfCheck
from scheduler.sequence import Sequence
from scheduler.slots import SlotPool
from scheduler.speculation import Speculator
from scheduler.step_timeout import StepTimeout
from scheduler.suspects import Suspects
from scheduler.waiting import WaitingQueue
from shared.config import Settings
from shared.messages import (
    BlocksArchived,
    BlocksLoaded,
    BlockStore,
    FinishReason,
    Release,
    RowResult,
    Shrink,
    Step,
    StepResult,
    TokenLogprob,
    Verified,
    WorkerInfo,
)

NEWS_TIMEOUT_S = 1.0  # for what a new target's archive holds; it comes right behind the Ready, or was lost
LOAD_TIMEOUT_S = 20.0  # for blocks from the archive; then a message was lost
SHRINK_INTERVAL_S = 10.0  # while memory stays short: what is cached meanwhile may be worth its place


class End(Protocol):
    """Ends a request."""

    def __call__(
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
    ) -> None: ...


@dataclass
class InFlight:
    """A step that the target has: whose rows they are, in which incarnation, and when it left."""

    step_id: int
    rows: dict[int, tuple[Sequence, int, int]]  # slot -> (sequence, incarnation, num_drafts), sampled rows only
    sent: float
    k: int  # drafted tokens that were asked for; 0 for a plain step
    batch: int  # decode rows
    width: int  # of the widest decode row; of a mean one, rounded up, where rows are packed
    is_decode_only: bool
    num_tokens: int
    sequences: list[Sequence]  # of all rows
    is_alone: bool = True  # nothing of it hid behind another: its time is its own
    policy_k: int = 0  # as k, were there no prefills
    num_prompt_tokens: int = 0
    num_started: int = 0  # sequences that get their first token of it


class Session:
    """Args:
    target_id, epoch, info: of the target.
    end: called for a sequence whose last token has come; it calls `free_slot`.
    """

    def __init__(
        self,
        target_id: str,
        epoch: int,
        info: WorkerInfo,
        settings: Settings,
        metrics: Metrics,
        waiting: WaitingQueue,
        speculator: Speculator,
        suspects: Suspects,
        step_timeout: StepTimeout,
        outbox: Outbox,
        end: End,
    ) -> None:
        self.target_id = target_id
        self.epoch = epoch
        self.metrics = metrics
        self.waiting = waiting
        self.speculator = speculator
        self.suspects = suspects
        self.running: list[Sequence] = []
        self.slots = SlotPool(info.num_slots, info.kv_capacity_tokens, info.capacity_classes)
        self.prefix: PrefixCache | None = None
        if info.prefix_cache is not None:
            # A prompt's token takes no longer than one of the widest step that was measured.
            token_s = min((cost.seconds / (cost.batch * cost.width) for cost in info.step_costs), default=0.0)
            self.prefix = PrefixCache(
                info.prefix_cache, info.fingerprint, metrics.prefix, settings.prefix_check_rate, adapters=info.adapters,
                token_s=token_s,
            )  # fmt: skip
        budget = settings.max_num_batched_tokens or info.max_step_tokens
        self.planner = Planner(
            waiting, self.running, self.slots, budget, info.max_step_tokens, self.prefix, info.whole_media
        )
        self.step_s = 0.0  # moving average
        self._queues_steps = info.queues_steps
        self._look_ahead = LookAhead(info.queues_steps)
        self._settings = settings
        self._outbox = outbox
        self._end = end
        self._check: SelfCheck | None = None
        self._in_flight: deque[InFlight] = deque()
        self._holds_features = self._is_holding = False  # the next step will, the last one did
        self._news_deadline: float | None = None
        self._loads: dict[int, float] = {}  # LoadBlocks that were not answered -> when they left
        self._num_steps = 0
        self._num_releases = 0
        self._freed: list[int] = []
        self._kept: list[BlockStore] = []  # of the freed slots
        self._shrink: Shrink | None = None  # to go with the next Release
        self._last_shrink = float("-inf")
        self._last_result = 0.0
        self._last_kind: tuple[int, int] | None = None  # (k, batch) of the last result, if that was a decode-only step
        self._timeout = step_timeout
        self._policy_k = 0  # for the rows that decode, were there no prefills
        self._is_drafted = False  # drafts for the running sequences' present state were asked for

    def is_hung(self, now: float) -> bool:
        """Whether a step takes far longer than steps do."""
        if not self._in_flight:
            return False
        step = self._in_flight[0]
        return now - max(step.sent, self._last_result) > self._timeout.limit_s(step.num_tokens)

    @property
    def oldest_step(self) -> int:
        """Id of the step whose result comes next; 0: there is none."""
        return self._in_flight[0].step_id if self._in_flight else 0

    def has_lost_load(self, now: float) -> bool:
        """Whether a LoadBlocks or its answer was lost: a sequence waits for it, and its blocks may yet be written."""
        return any(now - sent > LOAD_TIMEOUT_S for sent in self._loads.values())

    def close(self, strikes: int, is_silent: bool) -> list[Sequence]:
        """The target is gone: every running sequence waits to be computed again by the next one.

        Args:
            strikes: how much this says against what the target was working on.
            is_silent: only missing heartbeats tell of it.
        Returns:
            the sequences that are certain enough to have been the cause.
        """
        poison = self.suspects.blame((s for step in self._in_flight for s in step.sequences), strikes, is_silent)
        for sequence in self.running:
            sequence.rewind()
            self.waiting.push(sequence)
        self.running.clear()
        self.metrics.prefix.blocks["device"] = self.metrics.prefix.tier_bytes["device"] = 0
        return poison

    # ------------------------------------------------ slots

    def free_slot(self, sequence: Sequence, is_suspect: bool = False) -> None:
        """Take a running sequence's slot; what it computed goes to the prefix cache, unless it is suspect."""
        assert sequence.slot is not None, "free a slot that is not held"
        if self.prefix is not None:
            if is_suspect:
                self.prefix.drop(sequence)
            elif (store := self.prefix.keep(sequence)) is not None:
                self._kept.append(store)
        self.slots.free(sequence.slot)
        self.running.remove(sequence)
        if sequence.is_started:
            self._freed.append(sequence.slot)

    def release_freed(self) -> None:
        if self._freed or self._shrink is not None:
            self._num_releases += 1
            release = Release(
                epoch=self.epoch,
                slots=self._freed,
                stores=self._kept,
                release_id=self._num_releases,
                after_step=self._num_steps,
                shrink=self._shrink,
            )
            self._outbox.send(self.target_id, release)
        self._freed, self._kept, self._shrink = [], [], None

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's slot; it waits to be computed again."""
        self.free_slot(sequence)
        sequence.rewind()
        sequence.num_preemptions += 1
        self.waiting.push(sequence)
        self.metrics.preemptions.inc()

    def preempt_newest(self) -> bool:
        """False: there is at most one, which goes on whatever happens."""
        if len(self.running) < 2:
            return False
        self.preempt(max(self.running, key=lambda s: s.order))
        return True

    def shrink(self, now: float, at_once: bool) -> None:
        """Have the target give back memory that no sequence needs, cached blocks included; not all the time."""
        if not at_once and now - self._last_shrink < SHRINK_INTERVAL_S:
            return
        self._last_shrink = now
        kept_blocks, free_states = self.prefix.shrink() if self.prefix is not None else ([], [])
        self._shrink = Shrink(kept_blocks=kept_blocks, free_states=free_states)

    # ------------------------------------------------ steps

    def plan_steps(self, now: float) -> None:
        """Send the target what it can take: free slots, blocks to load, steps."""
        self.release_freed()
        self._give_up_news(now)
        while len(self._in_flight) < self._look_ahead.num_steps:
            if not self.running and not len(self.waiting):
                self._plan_check(now)
                return
            self._end_check()
            k = self._draft(now)
            if k is None:
                return
            drafts_for = self.speculator.drafts_for if k else None
            if self.suspects:
                in_flight = (s for step in self._in_flight for s in step.sequences)
                self.planner.suspect = self.suspects.choose(in_flight, self.waiting.peek())
            plan = self.planner.plan(now, drafts_for, self.preempt, self._settings.ttft_bound_s)
            self.release_freed()
            self._send_loads(now)
            if not plan:
                return
            self._is_drafted = False
            self._num_steps += 1
            if k:
                described = map(self.speculator.described, plan.decodes, plan.sequences)  # prefills come last
                plan.decodes = list(described)
            step = Step(
                epoch=self.epoch,
                step_id=self._num_steps,
                starts=plan.starts,
                decodes=plan.decodes,
                encodes=plan.encodes,
                prefills=plan.prefills,
                stores=plan.stores,
                after_release=self._num_releases,
                holds_features=self._holds_features,
            )
            self._is_holding = self._holds_features
            sent = _in_flight(step, plan, now, k, self.speculator.packs_rows)
            sent.is_alone, sent.policy_k = not (self._queues_steps and self._in_flight), self._policy_k
            self._in_flight.append(sent)
            self._outbox.send(self.target_id, step)
            self.metrics.iteration_tokens.observe(plan.num_tokens)
            if plan.decodes:
                self.metrics.batch_occupancy.observe(len(plan.decodes))

    def _plan_check(self, now: float) -> None:
        """Nobody wants anything: compute a cached prefix again."""
        prefix = self.prefix
        if prefix is None or self._in_flight:
            return
        if self._check is None and prefix.to_check:
            hit = prefix.to_check.pop()
            capacity = self.slots.class_for(len(hit.token_ids))
            if capacity is not None and self.slots.can_hold(capacity):
                self._check = SelfCheck(self.slots.allocate(capacity), capacity, hit)
        if self._check is None:
            return
        self._num_steps += 1
        chunk = min(self.planner.max_step_tokens, self.planner.max_prefill_tokens)
        step = self._check.next_step(self.epoch, self._num_steps, chunk, prefix)
        step = msgspec.structs.replace(step, after_release=self._num_releases)
        self._in_flight.append(InFlight(step.step_id, {}, now, 0, 0, 0, False, num_tokens=chunk, sequences=[]))
        self._outbox.send(self.target_id, step)
        if self._check.is_done:
            self._end_check()
            self.release_freed()

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
        if decoding:
            self._holds_features = self.speculator.holds_features(len(decoding))
        has_prefills = self.planner.has_prefills()
        k = self.speculator.choose_k(len(decoding), has_prefills, self.planner.max_step_tokens)
        self._policy_k = self.speculator.choose_k(len(decoding), False, 0) if has_prefills else k
        if k == 0 or (self._is_holding and self.speculator.is_neural):
            return 0  # one more plain step brings the drafter what was held back
        if self._in_flight:
            return None  # drafts need the token before them
        if not self._is_drafted:
            self._is_drafted = True
            for request in self.speculator.request(decoding, k, now):
                assert self.speculator.drafter_id is not None, "drafts are asked of a drafter"
                self._outbox.send(self.speculator.drafter_id, request)
        return None if self.speculator.is_waiting else k

    def result(self, result: StepResult, now: float) -> bool:
        """Commit a step's tokens. False: the result before it was lost, and with it what the rows hold."""
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            self.metrics.dropped["unexpected"].inc()
            return all(step.step_id != result.step_id for step in self._in_flight)
        step = self._in_flight.popleft()
        if self.prefix is not None and self.prefix.num_checked:
            self.prefix.checked(result.differing)
        self.step_s = 0.9 * self.step_s + 0.1 * (now - step.sent) if self.step_s else now - step.sent
        step_s, elapsed_s = now - max(step.sent, self._last_result), now - (self._last_result or step.sent)
        self._last_result = now
        self._timeout.observe(step.num_tokens, step_s)
        if self.prefix is not None and not step.is_decode_only:
            self.prefix.pace.computed(step.num_tokens, step_s)
        self._look_ahead.finished(result.phases, step.is_alone)
        for phase, seconds in result.phases.items():
            if phase in self.metrics.phases:
                self.metrics.phases[phase].observe(seconds)
        num_tokens = 0
        gaps: dict[float, int] = {}  # when rows had their token before -> how many rows; mostly one entry
        emit_token = self._outbox.emit_token
        for row in result.rows:
            sequence, incarnation, num_drafts = step.rows.get(row.slot, (None, 0, 0))
            if sequence is None or sequence.incarnation != incarnation or sequence.finish_reason is not None:
                continue
            if (last := sequence.last_token) is not None:
                gaps[last] = gaps.get(last, 0) + 1
                # One more token of a sequence that goes on: what `_row_result` would take longest for, all in all.
                if (
                    num_drafts == 0
                    and len(new := row.token_ids) == 1
                    and new[0] not in sequence.stop_token_ids
                    and len(tokens := sequence.token_ids) + 1 < sequence.max_length
                    and row.error is None
                ):
                    sequence.num_pending -= 1
                    sequence.last_token = now
                    num_tokens += 1
                    emit_token(sequence, new, len(tokens) - sequence.num_prompt_tokens, row.logprobs)
                    tokens.append(new[0])
                    continue
            num_tokens += self._row_result(sequence, row, num_drafts, now)
        if self.suspects:
            self.suspects.clear_proven()
        if step.is_decode_only:
            is_steady = self._last_kind == (step.k, size_of(step.batch))
            if step.is_alone:
                self.speculator.costs.add(step.batch, step.width, step_s)
            self.speculator.stepped(step.batch, step.k, num_tokens, elapsed_s, is_steady, step.policy_k > 0)
        elif step.batch and step.num_prompt_tokens:
            self.speculator.prefilled(
                step.batch, step.policy_k, step.num_started, step.num_prompt_tokens, num_tokens - step.num_started,
                elapsed_s,
            )  # fmt: skip
        self._last_kind = (step.k, size_of(step.batch)) if step.is_decode_only else None
        self.metrics.generation_tokens.inc(num_tokens)
        for last_token, count in gaps.items():
            self.metrics.itl.observe(now - last_token, count)
        return True

    def _row_result(self, sequence: Sequence, row: RowResult, num_drafts: int, now: float) -> int:
        """Commit one row's tokens; how many the output took."""
        sequence.num_pending -= 1
        is_pooled = sequence.submit.pooling is not None
        is_whole = row.embedding is not None if is_pooled else 1 <= len(row.token_ids) <= num_drafts + 1
        if row.error is not None or not is_whole:
            error = row.error or "the target worker sent a malformed result"
            self._end(sequence, "error", now, error=error, is_suspect=True)
            return 0
        verified = None
        if num_drafts:
            # Of the rows that were sent, the rejected drafts are not part of the sequence: roll back.
            num_accepted = len(row.token_ids) - 1
            sequence.num_scheduled -= num_drafts - num_accepted
            if self.prefix is not None and num_accepted < num_drafts:
                self.prefix.forget_state(sequence)
            sequence.num_drafts += 1
            sequence.num_draft_tokens += num_drafts
            sequence.num_accepted_tokens += num_accepted
            drafter = self.speculator.verified(sequence, num_drafts, num_accepted)
            verified = Verified(drafter=drafter, num_draft_tokens=num_drafts, num_accepted=num_accepted)
        kept, reason = ([], "stop") if is_pooled else self._cut(sequence, row.token_ids)
        sequence.token_ids += kept
        if sequence.first_token is None:
            sequence.first_token = now
            self.metrics.ttft.observe(now - sequence.arrival)
            self.metrics.queue_time.observe((sequence.first_scheduled or now) - sequence.arrival)
            self.metrics.prompt_tokens.inc(sequence.num_prompt_tokens)
            self.metrics.prompt_tokens_cached.inc(sequence.num_cached_tokens)
        sequence.last_token = now
        if reason is not None:
            self._end(
                sequence, reason, now, token_ids=kept, logprobs=row.logprobs, verified=verified, embedding=row.embedding
            )
        else:
            self._outbox.emit(sequence, kept, row.logprobs, verified)
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

    # ------------------------------------------------ the prefix cache's tiers

    def _give_up_news(self, now: float) -> None:
        """A list of the archive that does not come is no longer waited for: then prompts are computed."""
        if self.prefix is None or not self.prefix.num_untold:
            return
        if self._news_deadline is None:
            self._news_deadline = now + NEWS_TIMEOUT_S
        elif now >= self._news_deadline:
            self.prefix.num_untold = 0

    def _send_loads(self, now: float) -> None:
        """What sequences wait for comes from the target's archive."""
        if self.prefix is not None and self.prefix.to_load:
            for load in self.prefix.to_load:
                self._loads[load.load_id] = now
                self._outbox.send(
                    self.target_id, msgspec.structs.replace(load, epoch=self.epoch, after_step=self._num_steps)
                )
            self.prefix.to_load = []

    def archive_message(self, message: BlocksLoaded | BlocksArchived, now: float) -> None:
        if self.prefix is None:
            self.metrics.dropped["unexpected"].inc()
        elif isinstance(message, BlocksArchived):
            self.prefix.archived(message)
        elif (sent := self._loads.pop(message.load_id, None)) is None or not self.prefix.loaded(message):
            self.metrics.dropped["unexpected"].inc()
        else:
            self.prefix.pace.loaded(sum(message.is_loaded), now - sent)

    # ------------------------------------------------ invariants

    def check_integrity(self) -> None:
        """Raises AssertionError where our own bookkeeping contradicts itself."""
        self.slots.check_integrity()
        if self.prefix is not None:
            self.prefix.check_integrity()
        assert all(s.slot is not None and s not in self.waiting for s in self.running), "running without a slot"
        held = [s.slot for s in self.running] + ([self._check.slot] if self._check is not None else [])
        assert len(held) == len(set(held)), "two sequences write to one slot"
        assert len(held) + self.slots.num_free_slots == self.slots.num_slots, "free + used != total"
        if self.prefix is not None and self.prefix.sharing is not None:
            assert self.prefix.sharing.num_sequences <= len(self.running), "a sequence without a slot shares blocks"
        drafted = {id(s): n for step in self._in_flight for s, i, n in step.rows.values() if i == s.incarnation}
        for s in self.running:
            # A row with k drafts is scheduled k positions beyond the one token that is certain to come.
            assert s.num_remaining >= -max(0, drafted.get(id(s), 0) - 1), "scheduled beyond the sequence's end"
            assert s.num_scheduled <= s.capacity, "scheduled beyond the slot's capacity"
            if self.prefix is not None and self.prefix.sharing is not None:
                assert s.slot is not None, "running without a slot"
                assert self.slots.num_shared(s.slot) == self.prefix.sharing.num_tokens(s), (
                    "shared blocks are miscounted"
                )
            assert s.finish_reason is None, "a finished request holds a slot"


def _in_flight(step: Step, plan: Plan, now: float, k: int, packs_rows: bool) -> InFlight:
    rows = {
        row.slot: (sequence, sequence.incarnation, row.num_drafts)
        for row, sequence in zip((*plan.decodes, *plan.prefills), plan.sequences, strict=True)
        if row.is_sampled
    }
    drafts = [row.num_drafts for row in plan.decodes] if k else []
    longest = math.ceil(sum(drafts) / len(drafts)) if packs_rows and drafts else max(drafts, default=0)
    return InFlight(
        step.step_id,
        rows,
        now,
        k,
        len(plan.decodes),
        1 + longest,
        not (plan.prefills or plan.encodes),
        plan.num_tokens,
        [*plan.sequences, *plan.encoding],
        num_prompt_tokens=sum(len(row.token_ids or ()) for row in plan.prefills),
        num_started=sum(row.is_sampled for row in plan.prefills),
    )
