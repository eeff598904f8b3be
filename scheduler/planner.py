"""What the next step computes: decode rows first, then prefill chunks under the token budget.

Order is by priority, then arrival, with ageing (see `waiting.py`). When KV capacity runs short the newest sequence of
the lowest priority gives up its slot and is recomputed later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from scheduler.media import whole_end
from scheduler.prefix.cache import PrefixCache
from scheduler.sequence import Sequence
from scheduler.slots import SlotPool
from scheduler.waiting import WaitingQueue
from shared.messages import BlockStore, EncodeRow, MediaKind, SequenceStart, StepRow

DraftsFor = Callable[[Sequence], list[int] | None]

OVERDRAFT = 4  # a prompt's end may take this part of the budget more: a forward for a few tokens costs like many
INITIAL_OUTPUT_TOKENS = 256  # a new slot has room for the prompt and so many output tokens: it seldom has to grow


@dataclass
class Plan:
    """One step's rows and whose they are: `sequences[i]` belongs to rows[i] of decodes, then prefills."""

    starts: list[SequenceStart] = field(default_factory=list)
    decodes: list[StepRow] = field(default_factory=list)
    prefills: list[StepRow] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    stores: list[BlockStore] = field(default_factory=list)
    encodes: list[EncodeRow] = field(default_factory=list)
    encoding: list[Sequence] = field(default_factory=list)  # whose media they are
    num_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills or self.encodes)


class Planner:
    """Args:
    slots: slots and KV budget of the target.
    max_step_tokens: token budget of a step; the end of a prompt may exceed it by a quarter.
    max_prefill_tokens: widest chunk that the target's caches take.
    prefix: cached prefixes; None: every prompt is computed.
    whole_media: kinds of which one prefill chunk must hold all tokens of an item.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        running: list[Sequence],
        slots: SlotPool,
        max_step_tokens: int,
        max_prefill_tokens: int,
        prefix: PrefixCache | None = None,
        whole_media: Collection[MediaKind] = (),
    ) -> None:
        self.waiting = waiting
        self.running = running
        self.slots = slots
        self.max_step_tokens = max_step_tokens
        self.max_prefill_tokens = max_prefill_tokens
        self.suspect: Sequence | None = None  # the one suspect that may be worked on (suspects.py)
        self.is_short = False  # of memory: sequences get slots one after the other only
        self.prefix = prefix
        self.whole_media = whole_media
        self._keeps_states = prefix is not None and prefix.info.is_recurrent

    def plan(
        self,
        now: float,
        drafts_for: DraftsFor | None,
        preempted: Callable[[Sequence], None],
        ttft_bound_s: float = 0.0,
    ) -> Plan:
        """Plan a step and mark its tokens as scheduled.

        Args:
            drafts_for: drafts to verify in a decode row, or None to leave the sequence out of this step. None in its
                place: a plain step.
            preempted: told of each sequence that lost its slot.
            ttft_bound_s: while a request has waited longer for its first token, decode rows stand back; 0 is off.
        """
        plan = Plan()
        budget = self.max_step_tokens
        if not self._is_late(now, ttft_bound_s):
            budget -= self._plan_decodes(plan, now, drafts_for, preempted)
        self._plan_prefills(plan, budget, now, preempted)
        if self.prefix is not None:
            self.prefix.end_plan()
        return plan

    def has_prefills(self) -> bool:
        """Is there a prompt to compute that has a slot or would get one?"""
        if len(self.waiting) and self.slots.num_free_slots:
            return True
        return any(s.num_remaining > 1 and not s.is_held for s in self.running)

    def _is_late(self, now: float, bound_s: float) -> bool:
        if bound_s <= 0:
            return False
        head = self.waiting.peek()
        late = [s for s in self.running if s.num_remaining > 1 and not s.is_held and now - s.arrival > bound_s]
        return bool(late) or (head is not None and self.slots.num_free_slots > 0 and now - head.arrival > bound_s)

    def _plan_decodes(
        self,
        plan: Plan,
        now: float,
        drafts_for: DraftsFor | None,
        preempted: Callable[[Sequence], None],
    ) -> int:
        used, decodes, sequences = 0, plan.decodes, plan.sequences
        for sequence in list(self.running):
            if used >= self.max_step_tokens:
                break
            length = len(sequence.token_ids) + sequence.num_pending
            if length - sequence.num_scheduled != 1 or length >= sequence.max_length or sequence.slot is None:
                continue
            if sequence.is_constrained and sequence.num_pending:
                continue  # the target builds the mask from the token that is still on its way
            if sequence.num_strikes and sequence is not self.suspect:
                continue
            is_plain = drafts_for is None and not self._keeps_states
            if is_plain and sequence.num_pending and length <= sequence.capacity:
                # Pipelined decode, by far the most frequent row: 256 of them have to be planned within 0.2 ms.
                decodes.append(StepRow(slot=sequence.slot, start=length - 1, capacity=sequence.capacity))
                sequence.num_scheduled = length
                sequence.num_pending += 1
                sequences.append(sequence)
                used += 1
                continue
            used += self._plan_decode(plan, sequence, now, drafts_for, preempted, self.max_step_tokens - used)
        plan.num_tokens += used
        return used

    def _plan_decode(
        self,
        plan: Plan,
        sequence: Sequence,
        now: float,
        drafts_for: DraftsFor | None,
        preempted: Callable[[Sequence], None],
        budget: int,
    ) -> int:
        """Plan one decode or verify row; the tokens it takes."""
        drafts = drafts_for(sequence) if drafts_for is not None else []
        if drafts is None:
            return 0
        room = sequence.max_length - len(sequence.token_ids) - sequence.num_pending - 1
        if self.prefix is not None and (border := self.prefix.num_drafts_to_border(sequence)) is not None:
            room = min(room, border)
        drafts = drafts[: max(0, min(room, budget - 1))]
        if not self._grow(sequence, sequence.num_scheduled + 1 + len(drafts), preempted, plan):
            return 0
        is_on_device = sequence.num_pending > 0
        assert not (drafts and is_on_device), "drafts need the token before them"
        token_ids = None if is_on_device else [sequence.token_ids[-1], *drafts]
        plan.decodes.append(self._row(plan, sequence, token_ids, len(drafts), True, now))
        return 1 + len(drafts)

    def _plan_prefills(self, plan: Plan, budget: int, now: float, preempted: Callable[[Sequence], None]) -> None:
        prefilling = sorted(
            (s for s in self.running if s.num_remaining > 1 and (not s.num_strikes or s is self.suspect)),
            key=lambda s: s.order,
        )
        while budget > 0:
            sequence = self._next_prefill(prefilling)
            if sequence is None:
                return
            if sequence.submit.media and not sequence.is_started and any(start.media for start in plan.starts):
                return  # a message holds the arrays of one request
            if self.prefix is not None and not self._restore(sequence, self.prefix):
                continue
            first = sequence.num_scheduled
            n = sequence.num_remaining
            if n > min(budget + self.max_step_tokens // OVERDRAFT, self.max_prefill_tokens):
                n = min(budget, self.max_prefill_tokens)
            end = first + n
            if sequence.submit.media and (media := sequence.next_media()) is not None:
                index, item = media
                if item.start <= first:
                    # The encoder's run is this step's whole prefill share, so that decode rows wait for one at most.
                    if not plan.prefills:
                        self._start(plan, sequence, now)
                        assert sequence.slot is not None, "a planned sequence holds a slot"
                        plan.encodes.append(EncodeRow(slot=sequence.slot, index=index))
                        plan.encoding.append(sequence)
                        plan.num_tokens += item.num_tokens
                        sequence.num_encoded = index + 1
                    return
                end = min(end, item.start)
            if self.whole_media:
                end = whole_end(sequence.submit.media, self.whole_media, first, end)
            if self.prefix is not None:
                end = self.prefix.chunk_end(sequence, end)
            n = end - first
            if not self._grow(sequence, end, preempted, plan):
                continue
            row = self._row(plan, sequence, sequence.token_ids[first : first + n], 0, n == sequence.num_remaining, now)
            plan.prefills.append(row)
            plan.num_tokens += n
            budget -= n
            if self.prefix is not None and (store := self.prefix.store_prefilled(sequence)) is not None:
                plan.stores.append(store)
                self._charge(sequence)

    def _restore(self, sequence: Sequence, prefix: PrefixCache) -> bool:
        """Before a sequence's first row: take what is cached. False: what it needs is on its way."""
        if not sequence.is_started:
            sequence.is_held = prefix.must_wait(sequence)
            if sequence.is_held:
                return False
            prefix.start(sequence)
            self._charge(sequence)
        return True

    def _charge(self, sequence: Sequence) -> None:
        """The cache pays for blocks that the sequence shares with it."""
        if self.prefix is not None and self.prefix.sharing is not None:
            assert sequence.slot is not None, "a sequence with blocks holds a slot"
            self.slots.share(sequence.slot, self.prefix.sharing.num_tokens(sequence))

    def _next_prefill(self, prefilling: list[Sequence]) -> Sequence | None:
        """The first in order of those that prefill already and those that wait for a slot."""
        head = self.waiting.peek()
        if head is not None and head.num_strikes and head is not self.suspect:
            head = None
        if head is not None and (not prefilling or head.order < prefilling[0].order) and self._admit(head):
            return head
        while prefilling:
            sequence = prefilling.pop(0)
            if sequence.slot is not None:  # not preempted while planning
                return sequence
        if head is not None and head in self.waiting and self._admit(head):
            return head
        return None

    def _admit(self, sequence: Sequence) -> bool:
        """Give the head of the queue a slot if there is one and its capacity fits."""
        if self.slots.num_free_slots == 0 or (self.is_short and self.running):
            return False
        shared = self.prefix.share(sequence) if self.prefix is not None else 0
        wanted = min(sequence.submit.max_tokens, INITIAL_OUTPUT_TOKENS) + len(sequence.token_ids)
        capacity = self.slots.class_for(min(wanted, self.slots.capacity_classes[-1]))
        if capacity is None or not self.slots.can_hold(capacity - shared):
            capacity = self.slots.class_for(len(sequence.token_ids) + 1)
        if capacity is None or not self.slots.can_hold(capacity - shared):
            if self.prefix is not None and self.prefix.sharing is not None:
                self.prefix.sharing.release(sequence)
            return False
        self.waiting.admit(sequence)
        sequence.slot = self.slots.allocate(capacity, shared)
        sequence.capacity = capacity
        self.running.append(sequence)
        return True

    def _row(
        self, plan: Plan, sequence: Sequence, token_ids: list[int] | None, num_drafts: int, is_sampled: bool, now: float
    ) -> StepRow:
        assert sequence.slot is not None, "a planned sequence holds a slot"
        self._start(plan, sequence, now)
        end = sequence.num_scheduled + (1 if token_ids is None else len(token_ids))
        row = StepRow(
            slot=sequence.slot,
            start=sequence.num_scheduled,
            capacity=sequence.capacity,
            token_ids=token_ids,
            num_drafts=num_drafts,
            is_sampled=is_sampled,
            keep_state=self.prefix.state_for(sequence, end) if self.prefix is not None else None,
        )
        sequence.num_scheduled = end
        if is_sampled:
            sequence.num_pending += 1
        plan.sequences.append(sequence)
        return row

    @staticmethod
    def _start(plan: Plan, sequence: Sequence, now: float) -> None:
        """Before a sequence's first row or encoder run in an incarnation: tell the target of it."""
        if sequence.is_started:
            return
        assert sequence.slot is not None, "a planned sequence holds a slot"
        sequence.is_started = True
        if sequence.first_scheduled is None:
            sequence.first_scheduled = now
        plan.starts.append(
            SequenceStart(
                slot=sequence.slot,
                request_id=sequence.submit.request_id,
                sampling=sequence.submit.sampling,
                num_prompt_tokens=sequence.num_prompt_tokens,
                token_ids=sequence.token_ids,
                grammar=sequence.submit.grammar,
                thinking=sequence.submit.thinking,
                capacity=sequence.capacity,
                restore=sequence.restore,
                restore_state=sequence.restore_state,
                media=sequence.submit.media,
                pooling=sequence.submit.pooling,
                adapter=sequence.submit.adapter,
            )
        )

    def _grow(self, sequence: Sequence, num_tokens: int, preempted: Callable[[Sequence], None], plan: Plan) -> bool:
        """Have the slot hold `num_tokens`, preempting others for it; False if the sequence itself had to go."""
        if num_tokens <= sequence.capacity:
            return True
        capacity = self.slots.class_for(num_tokens)
        assert capacity is not None, f"{num_tokens} tokens were admitted, no slot holds them"
        assert sequence.slot is not None, "only a running sequence grows"
        while not self.slots.can_hold(capacity, instead_of=sequence.capacity):
            victim = max(self.running, key=lambda s: s.order)
            if victim in plan.sequences and victim is not sequence:
                # Already part of this very step: leave it and let the asker wait.
                victim = sequence
            preempted(victim)
            if victim is sequence:
                return False
        self.slots.grow(sequence.slot, capacity)
        sequence.capacity = capacity
        return True
