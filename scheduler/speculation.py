"""The speculation policy and the drafts on their way. Pure state, like the core that owns it.

The chosen k is that of the whole batch: rows of one verify share its width. A row may carry fewer drafts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from scheduler.acceptance import PRIOR, AcceptanceRates
from scheduler.costs import StepCosts
from scheduler.drafts import draws, first, problem
from scheduler.learned import Learned
from scheduler.metrics import Metrics
from scheduler.ngram import NOTHING, NgramIndex, Proposal, SharedSuffixIndex
from scheduler.policy import Policy
from scheduler.sequence import Sequence as Request
from shared.messages import Draft, DraftDistribution, DraftReply, DraftRequest, DraftRow, RequestId, StepCost, StepRow

DRAFT_PATIENCE = 4.0  # a reply may take so many times its usual time
MIN_PATIENCE_S = 0.03
FIRST_PATIENCE_S = 2.0  # before anything was measured: kernels are compiled for the first draft
LOST_REPLY_S = 10.0  # after a time-out nothing more is asked until the reply comes after all, or for so long
OVERHEAD_S = 0.0005  # planning and transport of a synchronous round beside its step and draft
NGRAM_CERTAIN = 5  # a match of so many tokens goes before the neural drafter
MIN_MATCH = 2  # shorter matches are noise
MIN_CONFIDENCE = 0.25
AVAILABLE_WEIGHT = 0.05
HARDLY_LONGER = 8  # a draft of so many tokens than one of one less: not worth trials of its own
HARDLY_MORE = 1.3  # than a plain step: a launch-bound GPU's verify step, never a CPU's
SHARE_BESIDE_PREFILLS = 1 / 8  # of a step's tokens
MIN_AVAILABLE = 0.1  # of the rows may come to have a proposal, whatever the average says
FEW_TOKENS = 8  # are indexed sooner one by one
INDEXED_AT_ONCE = 1024  # tokens: under a millisecond
SHARED_TOKENS = 65_536  # of recent outputs that are remembered, all tenants together: about 50 MB


TEXT_SOURCES = ("ngram", "suffix")  # drafts out of text: the sequence's own, and recent outputs of the same tenant


@dataclass(frozen=True)
class Asked:
    """Drafts on their way."""

    draft_id: int
    sent: float
    deadline: float
    k: int
    batch: int  # rows that the drafter works on
    is_catching_up: bool  # it takes more than a round's tokens in first


@dataclass
class Speculated:
    """What speculation knows of one running sequence."""

    index: NgramIndex | None
    num_indexed: int = 0
    num_shared: int = 0  # output tokens that are in the shared index
    num_sent: int = 0  # committed tokens that the drafter was sent
    drafts: list[int] = field(default_factory=list)
    distribution: DraftDistribution | None = None  # that the drafts were drawn from
    anchor: int = -1  # position that `drafts` follow
    source: str = ""


class Speculator:
    """Args:
    use_ngram: propose from each sequence's own text.
    max_draft_tokens: longest draft; 0 turns speculation off.
    metrics: counters.
    known: what was learned of each pair of models, by what `set_target` and `set_drafter` call them.
    """

    def __init__(
        self, use_ngram: bool, max_draft_tokens: int, metrics: Metrics, known: dict[str, Learned] | None = None
    ) -> None:
        self.known = {} if known is None else known
        self._target_name = self._drafter_name = ""
        self.use_ngram = use_ngram
        self._max_ngram = max_draft_tokens if use_ngram else 0
        self._shared = SharedSuffixIndex(max_tokens=SHARED_TOKENS)
        self.metrics = metrics
        self.costs = StepCosts()
        self.policy = Policy(self._round_s, self._expected_tokens)
        self.drafter_id: str | None = None
        self.drafter_kind = ""
        self.drafter_epoch = 0
        self.forced_k: int | None = None  # bench and tests: no policy
        self.max_batch = 0  # no drafts with more rows; 0: the policy alone decides
        self._neural = AcceptanceRates(max_draft_tokens)
        self._ngram = AcceptanceRates(max_draft_tokens)
        self._states: dict[RequestId, Speculated] = {}
        self._ended: list[RequestId] = []
        self.draft_costs = StepCosts()  # (batch, k) -> seconds from request to reply
        self._num_drafts = 0
        self._waiting: Asked | None = None
        self._ahead: set[int] = set()  # requests whose rows the drafter takes in, for drafts of later rounds
        self._late: Asked | None = None  # the reply did not come in time
        self._available = PRIOR  # share of rows for which the n-gram index has a proposal
        self._max_neural = 0
        self._max_verified = max_draft_tokens
        self._vocab_size = 0
        self._target_epoch = 0
        self.packs_rows = False
        for source in TEXT_SOURCES if use_ngram else ():
            metrics.add_drafter(source)

    # ------------------------------------------------ life of drafter and sequences

    @property
    def is_on(self) -> bool:
        return (self.use_ngram or self.is_neural) and self.max_draft_tokens > 0

    @property
    def max_draft_tokens(self) -> int:
        """The longest draft that a row may carry now."""
        return min(self._max_verified, max(self._max_ngram, self._max_neural if self.is_neural else 0))

    @property
    def is_neural(self) -> bool:
        """A drafter is there and answers. One that owes a reply is not asked again: it costs one time-out."""
        return self.drafter_id is not None and self._late is None

    def set_target(
        self,
        max_draft_tokens: int,
        step_costs: Iterable[StepCost],
        vocab_size: int,
        epoch: int = 0,
        packs_rows: bool = False,
        name: str = "",
    ) -> None:
        """A target is ready: what it can verify in one row, what its steps cost, and whether by the token.

        `name` tells weights, type and device apart; what is learned of one without a name is not kept.
        """
        self.keep()
        self._target_name = name
        self._max_verified = max_draft_tokens
        self._vocab_size = vocab_size
        self._target_epoch = epoch
        self.packs_rows = packs_rows
        self.costs = StepCosts(step_costs, is_by_token=packs_rows)
        self._begin_again()

    def set_drafter(
        self,
        instance_id: str,
        kind: str,
        epoch: int,
        max_draft_tokens: int,
        costs: Iterable[StepCost] = (),
        name: str = "",
    ) -> None:
        """A drafter is ready; it knows of no sequence yet. `costs` by batch and k, as it measured them at start."""
        self.keep()
        self._drafter_name = f"{name} {kind} {max_draft_tokens}"
        self.lose_drafter()
        self.drafter_id, self.drafter_kind, self.drafter_epoch = instance_id, kind, epoch
        self._neural = AcceptanceRates(max_draft_tokens)
        self.draft_costs = StepCosts(costs)
        self._max_neural = max_draft_tokens
        self._begin_again()
        self.metrics.add_drafter(kind)

    @property
    def _pair(self) -> str:
        """What the running pair is kept under."""
        text = "ngram" if self.use_ngram else ""
        return " ".join([self._target_name, str(self._max_verified), text, self._drafter_name])

    def keep(self) -> str | None:
        """Put what was learned into `known`; what it is kept under, None if there is nothing."""
        drafts = self.use_ngram or self._drafter_name
        learned = self.policy.learned(self._neural, self._ngram) if self._target_name and drafts else None
        if learned is None:
            return None
        self.known[self._pair] = learned
        return self._pair

    def _begin_again(self) -> None:
        """Another target or drafter: with what is known of the two."""
        self.policy.forget()
        learned = self.known.get(self._pair)
        if learned is not None:
            self.policy.recall(learned)
            self._neural.recall(learned.neural)
            self._ngram.recall(learned.ngram)

    def lose_drafter(self) -> None:
        self.drafter_id = None
        self._waiting = self._late = None
        self._ahead.clear()
        self._ended.clear()
        for state in self._states.values():
            state.num_sent = 0
            if state.source not in TEXT_SOURCES:
                state.drafts = []

    def end(self, sequence: Request) -> None:
        """A request is over; what it put out may help the next ones."""
        state = self._states.pop(sequence.submit.request_id, None)
        if self.use_ngram:
            self._share(state or Speculated(None), sequence)
        if state is not None and self.drafter_id is not None:
            self._ended.append(sequence.submit.request_id)

    def _state(self, sequence: Request) -> Speculated:
        request_id = sequence.submit.request_id
        state = self._states.get(request_id)
        if state is None:
            state = self._states[request_id] = Speculated(NgramIndex(min_n=MIN_MATCH) if self.use_ngram else None)
        return state

    # ------------------------------------------------ planning

    @property
    def is_waiting(self) -> bool:
        """Drafts were asked for and may still come: no step leaves until then."""
        return self._waiting is not None

    @property
    def deadline(self) -> float | None:
        return None if self._waiting is None else self._waiting.deadline

    def expire(self, now: float) -> None:
        """Stop waiting for a late reply; ask again where one was lost."""
        if self._late is not None and now - self._late.sent >= LOST_REPLY_S:
            self._late = None
        if self._waiting is not None and now >= self._waiting.deadline:
            self._waiting, self._late = None, self._waiting
            self.metrics.count_fallthrough("timeout")

    def choose_k(self, batch: int, has_prefills: bool = False, max_step_tokens: int = 0) -> int:
        """How many tokens to draft for `batch` decode rows; 0 for a plain, pipelined step. Changes nothing.

        Beside prefills drafts are verified only where that costs hardly anything: prompts come before speed-up. Text's
        drafts in packed rows cost by the token, so there they get a small share of a step's `max_step_tokens`.
        """
        if not self.is_on or batch == 0:
            return 0
        if self.forced_k is not None:
            return 0 if self._is_too_many(batch) else self.forced_k
        k = self._paying_k(batch)
        return self._beside_prefills(k, batch, max_step_tokens) if k and has_prefills else k

    def holds_features(self, batch: int) -> bool:
        """Whether the target may keep to itself what the drafter would draft from: with `batch` decode rows drafts do
        not pay, and what is sent for nothing costs up to a sixth of a plain step.
        """
        if not self.is_neural or self.forced_k is not None:
            return False
        return self._paying_k(batch) == 0

    def _paying_k(self, batch: int) -> int:
        return 0 if self._is_too_many(batch) else self.policy.choose(batch, self._candidates())

    def _is_too_many(self, batch: int) -> bool:
        """For any draft, by the user's word."""
        return 0 < self.max_batch < batch

    def _beside_prefills(self, k: int, batch: int, max_step_tokens: int) -> int:
        if self.costs.estimate(batch, k + 1) <= HARDLY_MORE * self.costs.estimate(batch, 1):
            return k
        if not self.packs_rows or self.is_neural:
            return 0
        num_drafting = batch * max(self._available, MIN_AVAILABLE)
        return min(k, int(SHARE_BESIDE_PREFILLS * max_step_tokens / num_drafting))

    def _candidates(self) -> list[int]:
        """One less than powers of two, which fill a padded verify row, and the longest draft where it differs."""
        most = self.max_draft_tokens
        found = {min(most, (1 << bits) - 1) for bits in range(1, most.bit_length() + 1)}
        return sorted(found - {most} if most >= HARDLY_LONGER and most - 1 in found else found)

    def _expected_tokens(self, k: int) -> float:
        if self.is_neural:
            return self._neural.expected_tokens(min(k, self._max_neural))
        return 1 + self._available * (self._ngram.expected_tokens(k) - 1)

    def _round_s(self, batch: int, k: int) -> float:
        """Seconds of a round by its parts: draft, then verify. Rows without an n-gram proposal carry no drafts: with
        none at all the verify has width 1, and where rows are packed each counts for itself.
        """
        if k == 0:
            return self.costs.estimate(batch, 1)
        wide = self.costs.estimate(batch, k + 1)
        if self.is_neural:
            return wide + self.draft_costs.estimate(batch, k) + OVERHEAD_S
        if self.packs_rows:
            return self.costs.estimate(batch, 1 + self._available * k) + OVERHEAD_S
        is_wide = 1 - (1 - self._available) ** batch
        return is_wide * wide + (1 - is_wide) * self.costs.estimate(batch, 1) + OVERHEAD_S

    def request(self, rows: Iterable[Request], k: int, now: float) -> list[DraftRequest]:
        """Prepare drafts for these decode rows; the messages for the drafter, in their order.

        n-gram proposals are ready at once. Rows of which the drafter has to take in more than a round's tokens, as of
        those that just began, hold up nobody: where others have drafts they go without this once, and the drafter takes
        them in while the target verifies. Call once for each state of the batch.
        """
        ready: list[DraftRow] = []
        behind: list[DraftRow] = []
        num_drafted = 0
        for sequence in rows:
            state = self._state(sequence)
            anchor = len(sequence.token_ids) - 1
            state.drafts, state.anchor, state.source, state.distribution = [], anchor, "", None
            if state.index is not None:
                proposal, source = self._proposal(state, sequence, k)
                self._available += AVAILABLE_WEIGHT * (float(bool(proposal.token_ids)) - self._available)
                if proposal.token_ids:
                    state.drafts, state.source = list(proposal.token_ids), source
                    num_drafted += 1
                    continue
            if self.is_neural:
                row = self._draft_row(state, sequence, k)
                (behind if len(row.token_ids) > 2 * k + 2 else ready).append(row)
        if not ready and not num_drafted:
            ready, behind = behind, []
        requests = [self._asked(ready, k, now)] if ready else []
        if behind:
            requests.append(self._message([replace(row, num_tokens=0) for row in behind]))
            self._ahead.add(self._num_drafts)
        return requests

    def _draft_row(self, state: Speculated, sequence: Request, k: int) -> DraftRow:
        """What the drafter lacks of a sequence."""
        start, sampling = state.num_sent, sequence.submit.sampling
        media = sequence.submit.media if start == 0 else []
        state.num_sent = len(sequence.token_ids)
        return DraftRow(
            request_id=sequence.submit.request_id,
            start=start,
            token_ids=sequence.token_ids[start:],
            num_tokens=min(k, self._max_neural),
            sampling=sampling if draws(sampling) else None,
            media=[replace(item, tensors=[]) for item in media],
        )

    def _asked(self, rows: list[DraftRow], k: int, now: float) -> DraftRequest:
        """Ask for drafts of these rows and wait for them."""
        message = self._message(rows)
        usual = self.draft_costs.estimate(len(rows), k)
        patience = max(MIN_PATIENCE_S, DRAFT_PATIENCE * usual) if usual else FIRST_PATIENCE_S
        is_catching_up = bool(self._ahead) or any(len(row.token_ids) > 2 * k + 2 for row in rows)
        if is_catching_up or self.forced_k is not None:
            patience = max(patience, FIRST_PATIENCE_S)  # a prompt has to be taken in; or to measure
        self._waiting = Asked(message.draft_id, now, now + patience, k, len(rows), is_catching_up)
        return message

    def _message(self, rows: list[DraftRow]) -> DraftRequest:
        self._num_drafts += 1
        ended, self._ended = self._ended, []
        return DraftRequest(
            epoch=self.drafter_epoch, draft_id=self._num_drafts, rows=rows, target_epoch=self._target_epoch,
            ended=ended,
        )  # fmt: skip

    def reply(self, message: DraftReply, now: float) -> None:
        """Take drafts in; a late or stale reply is dropped."""
        if message.epoch != self.drafter_epoch:
            self.metrics.count_fallthrough("stale")
            return
        is_ahead = message.draft_id in self._ahead
        self._ahead = {draft_id for draft_id in self._ahead if draft_id > message.draft_id}  # it works in their order
        if is_ahead:
            return
        late, asked = self._late, self._waiting
        if late is not None and late.draft_id == message.draft_id:  # too late to be used, but it tells the cost
            self._late = None
            self._measured(late, now)
            self.metrics.count_fallthrough("stale")
            return
        if asked is None or asked.draft_id != message.draft_id:
            self.metrics.count_fallthrough("stale")
            return
        self._waiting = None
        self._measured(asked, now)
        for draft in message.drafts:
            self._take(draft, asked.k)

    def _measured(self, asked: Asked, now: float) -> None:
        if not asked.is_catching_up:
            self.metrics.draft_seconds(now - asked.sent)
            self.draft_costs.add(asked.batch, asked.k, now - asked.sent)

    def _take(self, draft: Draft, k: int) -> None:
        state = self._states.get(draft.request_id)
        if state is None or state.anchor != draft.anchor:
            self.metrics.count_fallthrough("stale")
            return
        reason = problem(draft, self._vocab_size) if draft.token_ids else "no_draft"
        if reason is not None:
            self.metrics.count_fallthrough(reason)
            return
        state.drafts, state.source, state.distribution = draft.token_ids[:k], self.drafter_kind, draft.distribution

    def drafts_for(self, sequence: Request) -> list[int]:
        """The drafts to verify behind this sequence's last token."""
        state = self._states.get(sequence.submit.request_id)
        if state is None or state.anchor != len(sequence.token_ids) - 1 or sequence.num_pending:
            return []
        return state.drafts

    def described(self, row: StepRow, sequence: Request) -> StepRow:
        """A planned row with the distribution of its drafts, where they were drawn."""
        state = self._states.get(sequence.submit.request_id)
        if row.num_drafts == 0 or state is None or state.distribution is None:
            return row
        return replace(row, draft_distribution=first(state.distribution, row.num_drafts))

    # ------------------------------------------------ results

    def verified(self, sequence: Request, num_drafts: int, num_accepted: int) -> str:
        """One row was verified. Returns the kind of the drafter that had made its drafts."""
        state = self._states.get(sequence.submit.request_id)
        source = state.source if state is not None and state.source else "none"
        (self._ngram if source in TEXT_SOURCES else self._neural).add(num_drafts, num_accepted)
        self.metrics.count_draft(source, num_drafts, num_accepted)
        return source

    def stepped(
        self, batch: int, k: int, num_tokens: int, elapsed_s: float, is_steady: bool, is_drafting: bool | None = None
    ) -> None:
        """A decode-only step of this batch, planned with this k, gave its result.

        Args:
            num_tokens: committed by it.
            elapsed_s: since the result before it, drafting and all else included.
            is_steady: that result was one of the same kind, so that `elapsed_s` is a whole round.
            is_drafting: drafts were wanted, even if there were none; None: as k says.
        """
        if self.forced_k is None:
            candidates = self._candidates() if self.is_on else ()
            self.policy.finished(batch, k, num_tokens, elapsed_s, is_steady, candidates, is_drafting)

    def prefilled(
        self, batch: int, k: int, num_started: int, num_prompt_tokens: int, num_tokens: int, elapsed_s: float
    ) -> None:
        """A step with prompts gave its result: see `Policy.prefilled`."""
        if self.forced_k is None:
            self.policy.prefilled(batch, k, num_started, num_prompt_tokens, num_tokens, elapsed_s)

    def _proposal(self, state: Speculated, sequence: Request, k: int) -> tuple[Proposal, str]:
        """What the sequence's own text, else its tenant's recent outputs, let expect; nothing if that is vague."""
        assert state.index is not None, "proposals without an index"
        self._index(state, sequence)
        self._share(state, sequence)
        least = NGRAM_CERTAIN if self.is_neural else MIN_MATCH
        proposal = state.index.propose(k)
        if proposal.match_length >= least and proposal.confidence >= MIN_CONFIDENCE:
            return proposal, "ngram"
        proposal = self._shared.propose(sequence.token_ids, k, sequence.submit.tenant)
        if proposal.match_length >= least and proposal.confidence >= MIN_CONFIDENCE:
            return proposal, "suffix"
        return NOTHING, ""

    def _share(self, state: Speculated, sequence: Request) -> None:
        """Put new output tokens into the index that the tenant's other requests see."""
        new = sequence.token_ids[sequence.num_prompt_tokens + state.num_shared :]
        if new:
            self._shared.append(sequence.submit.request_id, new, sequence.submit.tenant)
            state.num_shared += len(new)

    def _index(self, state: Speculated, sequence: Request) -> None:
        assert state.index is not None, "indexing without an index"
        new = sequence.token_ids[state.num_indexed :]
        if len(new) > FEW_TOKENS:
            state.index.extend(new)
        else:
            for token in new:
                state.index.append(token)
        state.num_indexed = len(sequence.token_ids)

    def index_ahead(self, rows: Iterable[Request]) -> bool:
        """Index a part of a prompt while it is being computed, so that its first token does not wait for that. False
        where nothing is left to do.
        """
        for sequence in rows if self.use_ngram else ():
            state = self._states.get(sequence.submit.request_id)
            at = 0 if state is None else state.num_indexed
            if at < sequence.num_prompt_tokens:
                state = state or self._state(sequence)
                assert state.index is not None, "indexing without an index"
                part = sequence.token_ids[at : min(at + INDEXED_AT_ONCE, sequence.num_prompt_tokens)]
                state.index.extend(part)
                state.num_indexed += len(part)
                return True
        return False
