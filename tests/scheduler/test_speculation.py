"""The policy, and the core with a drafter that answers well, late, never, wrongly or for other anchors."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import speculation
from scheduler.acceptance import AcceptanceRates
from scheduler.costs import StepCosts
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from scheduler.policy import CHANGE_AFTER, MIN_GAIN, TRIAL_ROUNDS, TRIAL_ROWS, Trial
from scheduler.speculation import OVERHEAD_S, Asked, Speculator
from shared.messages import (
    Cancel,
    Draft,
    DraftReply,
    DraftRequest,
    DraftRow,
    Hello,
    Ready,
    RequestId,
    Step,
    StepCost,
    WorkerInfo,
)
from tests.scheduler.test_core import EVENT, Rig
from tests.support.fake_target import VOCAB, greedy, worker_info

K = 4


class DraftRig(Rig):
    """A rig with a drafter; its requests wait in `asked` until `answer` takes one."""

    def __init__(self, info: WorkerInfo | None = None, k: int | None = K, **changes: object) -> None:
        self.asked: deque[DraftRequest] = deque()
        self.texts: dict[str, list[int]] = {}
        self.num_drafters = 0
        super().__init__(info or worker_info(max_draft_tokens=K), draft_block_size=K, **changes)
        self.core.speculator.forced_k = k

    def deliver(self, envelopes: list[Envelope]) -> None:
        for receiver, message in envelopes:
            if isinstance(message, DraftRequest):
                assert receiver == self.drafter_id, "a request for a drafter that is gone"
                self.asked.append(message)
            elif receiver == self.drafter_id and type(message).__name__ == "Welcome":
                self.drafter_epoch = message.epoch  # type: ignore[attr-defined] # a Welcome
        super().deliver(envelopes)

    @property
    def drafter_id(self) -> str:
        return f"drafter{self.num_drafters}"

    def start_drafter(self) -> None:
        self.num_drafters += 1
        self.asked.clear()
        self.texts.clear()
        self.send(self.drafter_id, Hello(role="drafter", instance_id=self.drafter_id, pid=3))
        info = worker_info(draft_kind="model", max_draft_tokens=K)
        self.send(self.drafter_id, Ready(epoch=self.drafter_epoch, info=info))

    def right(self, row: DraftRow) -> list[int]:
        text = self.texts.setdefault(row.request_id, [])
        assert row.start <= len(text), "the drafter was not sent a part of the text"
        text[row.start :] = row.token_ids
        return greedy(text, row.num_tokens)

    def answer(self, how: str = "right", request: DraftRequest | None = None) -> bool:
        """Answer the oldest request: right, half right, wrong, too long, for other anchors, partly; or lose it."""
        if request is None:
            if not self.asked:
                return False
            request = self.asked.popleft()
        drafts = []
        for i, row in enumerate(request.rows):
            tokens, anchor = self.right(row), row.start + len(row.token_ids) - 1
            match how:
                case "half":
                    tokens = [*tokens[:1], *[(t + 1) % VOCAB for t in tokens[1:]]]
                case "wrong":
                    tokens = [(t + 1) % VOCAB for t in tokens]
                case "long":
                    tokens = tokens + [0] * 100
                case "anchor":
                    anchor += 1
                case "partly" if i % 2:
                    continue
                case "empty":
                    tokens = []
            drafts.append(Draft(request_id=row.request_id, anchor=anchor, token_ids=tokens))
        if how != "never":
            reply = DraftReply(epoch=self.drafter_epoch, draft_id=request.draft_id, drafts=drafts, seconds=0.001)
            self.send(self.drafter_id, reply)
        return True

    def wake(self) -> bool:
        """Let the drafter's time run out."""
        deadline = self.core.deadline
        if deadline is None:
            return False
        self.now = max(self.now, deadline)
        self.deliver(self.core.wake(self.now))
        self.core.check_integrity()
        return True

    def drain(self, how: str = "right") -> None:
        for _ in range(100_000):
            if not (self.work() or self.answer(how) or self.wake()):
                return
        raise AssertionError("the schedule does not end")


HOW = st.sampled_from(["right", "half", "wrong", "long", "anchor", "partly", "empty", "never"])
DRAFT_EVENT = st.one_of(
    EVENT,
    st.tuples(st.just("answer"), HOW),
    st.tuples(st.just("wake")),
    st.tuples(st.just("restart drafter")),
    st.tuples(st.just("lose drafter")),
    st.tuples(st.just("answer again")),
)


@given(
    events=st.lists(DRAFT_EVENT, max_size=60),
    slots=st.integers(1, 5),
    kv=st.sampled_from([64, 72, 128, 1000]),
    ngram=st.booleans(),
    k=st.sampled_from([1, K, None]),
    is_host_bound=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_random_schedules_with_any_drafter_give_each_request_its_own_greedy_tokens(
    events: list[tuple[object, ...]], slots: int, kv: int, ngram: bool, k: int | None, is_host_bound: bool
) -> None:
    info = worker_info(num_slots=slots, kv_capacity_tokens=kv, max_draft_tokens=K, queues_steps=True)
    rig = DraftRig(info, k, ngram=ngram)
    rig.is_host_bound = is_host_bound
    rig.start_target()
    rig.start_drafter()
    submitted: dict[str, tuple[list[int], int]] = {}
    cancelled: set[str] = set()
    last: DraftRequest | None = None
    for event in events:
        match event:
            case ("submit", list() as prompt, int() as max_tokens, int() as priority):
                name = f"r{len(submitted)}"
                submitted[name] = (prompt, max_tokens)
                rig.submit(name, prompt, max_tokens, priority=priority)
            case ("cancel", int() as index) if index < len(submitted):
                cancelled.add(f"r{index}")
                rig.send("front", Cancel(request_id=RequestId(f"r{index}")))
            case ("work", int() as n):
                for _ in range(n):
                    rig.work()
            case ("restart",):
                rig.start_target()
            case ("tick",):
                rig.deliver(rig.core.tick(rig.now))
            case ("answer", str() as how):
                last = rig.asked[0] if rig.asked else None
                rig.answer(how)
            case ("answer again",) if last is not None and rig.core.speculator.drafter_id:
                reply = DraftReply(epoch=rig.drafter_epoch, draft_id=last.draft_id, drafts=[], seconds=0.1)
                rig.send(rig.drafter_id, reply)
            case ("wake",):
                rig.wake()
            case ("restart drafter",):
                last = None
                rig.start_drafter()
            case ("lose drafter",) if rig.core.speculator.drafter_id:
                last = None
                rig.asked.clear()
                rig.deliver(rig.core.lose(rig.drafter_id, rig.now))
    rig.assert_idle()
    for name, (prompt, max_tokens) in submitted.items():
        expected = greedy(prompt, max_tokens)
        if name in rig.rejected:
            continue
        (reason,) = rig.finish_reasons(name)
        assert reason == "length" or (reason == "abort" and name in cancelled)
        assert rig.tokens(name) == (expected if reason == "length" else expected[: len(rig.tokens(name))])


def started(**changes: object) -> DraftRig:
    rig = DraftRig(**changes)  # type: ignore[arg-type]
    rig.start_target()
    rig.start_drafter()
    return rig


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    num_steps = {}
    for how in ("right", "wrong"):
        rig = started()
        rig.submit("a", [1, 2], 41)
        rig.drain(how)
        assert rig.tokens("a") == greedy([1, 2], 41)
        num_steps[how] = rig.core.session._num_steps  # type: ignore[union-attr] # a target is ready
    assert num_steps == {"right": 1 + 40 // (K + 1), "wrong": 41}


def test_a_hung_drafter_costs_one_time_out_and_is_asked_again_only_after_long() -> None:
    rig = started(heartbeat_timeout_s=1000.0)
    rig.submit("a", [1, 2], 40)
    rig.work()
    assert len(rig.asked) == 1
    assert not rig.queue
    assert rig.wake()
    assert isinstance(rig.queue[0], Step), "plain decode did not go on at once"
    for _ in range(8):
        rig.work()
    assert len(rig.asked) == 1
    assert rig.core.deadline is None
    rig.now += speculation.LOST_REPLY_S
    rig.deliver(rig.core.tick(rig.now))
    while rig.work():
        pass
    assert len(rig.asked) == 2
    rig.right(rig.asked.popleft().rows[0])  # it has read the request that it never answers
    rig.drain()
    assert rig.tokens("a") == greedy([1, 2], 40)


def test_a_late_reply_is_dropped_and_tells_what_drafting_costs() -> None:
    rig = started()
    rig.submit("a", [1, 2], 40)
    rig.work()
    rig.wake()
    late = rig.core.speculator._late
    assert late is not None
    rig.now += 1.0
    rig.answer()
    assert rig.core.speculator.draft_costs.estimate(1, K) == pytest.approx(rig.now - late.sent)
    rig.drain()
    assert rig.tokens("a") == greedy([1, 2], 40)


def test_a_lost_drafter_is_not_waited_for_and_a_new_one_gets_the_whole_text() -> None:
    rig = started()
    rig.submit("a", [1, 2], 40)
    rig.work()
    assert rig.core.speculator.is_waiting
    rig.asked.clear()
    rig.deliver(rig.core.lose(rig.drafter_id, rig.now))
    assert isinstance(rig.queue[0], Step)
    assert not rig.core.speculator.is_waiting
    for _ in range(4):
        rig.work()
    rig.start_drafter()
    while not rig.asked:
        assert rig.work()
    (row,) = rig.asked[0].rows
    assert row.start == 0
    assert row.token_ids == [1, 2, *rig.tokens("a")]
    rig.drain()
    assert rig.tokens("a") == greedy([1, 2], 40)


def test_a_draft_longer_than_what_was_asked_for_is_cut() -> None:
    rig = started()
    rig.submit("a", [1, 2], 40)
    rig.drain("long")
    assert rig.tokens("a") == greedy([1, 2], 40)


def test_ended_requests_are_told_to_the_drafter() -> None:
    rig = started()
    rig.submit("a", [1, 2], 3)
    rig.drain()
    rig.submit("b", [1], 6)
    rig.work()
    assert rig.asked[0].ended == ["a"]


# ------------------------------------------------ the policy

PLAIN_S = 0.010


def speculator(wide_s: float, draft_s: float, rate: float, max_draft: int = 8) -> Speculator:
    """With a drafter whose every draft is accepted with chance `rate`, and these costs.

    Args:
        wide_s: of a step of width max_draft + 1; those between are interpolated.
    """
    made = Speculator(False, max_draft, Metrics())
    costs = [StepCost(batch=b, width=w, seconds=s) for b in (1, 8) for w, s in ((1, PLAIN_S), (max_draft + 1, wide_s))]
    made.set_target(max_draft, costs, VOCAB)
    drafts = [StepCost(batch=1, width=k, seconds=draft_s) for k in range(1, max_draft + 1)]
    made.set_drafter("d", "model", 1, max_draft, drafts)
    made._neural._rates, made._neural._seen = [rate] * max_draft, [10_000] * max_draft
    return made


def test_without_drafter_or_rows_nothing_is_drafted() -> None:
    made = speculator(0.011, 0.001, 0.9)
    assert made.choose_k(0) == 0
    made.lose_drafter()
    assert not made.is_on
    assert made.choose_k(4) == 0


@pytest.mark.parametrize(("wide_s", "draft_s", "rate"), [(0.1, 0.001, 0.5), (0.011, 0.05, 0.6), (0.011, 0.001, 0.01)])
def test_expensive_verify_expensive_draft_or_bad_drafts_park_the_drafter(
    wide_s: float, draft_s: float, rate: float
) -> None:
    assert speculator(wide_s, draft_s, rate).choose_k(1) == 0


@pytest.mark.parametrize(
    ("wide_s", "is_drafted"), [(0.0125, True), (0.03, False)], ids=["launch-bound", "compute-bound"]
)
def test_beside_prefills_only_drafts_that_cost_hardly_anything_are_verified(wide_s: float, is_drafted: bool) -> None:
    made = speculator(wide_s, 0.001, 0.95)
    assert made.choose_k(1) > 0
    assert (made.choose_k(1, has_prefills=True) > 0) is is_drafted


def from_text(packs_rows: bool, wide_s: float, available: float) -> Speculator:
    """Drafts from text, all accepted, for that share of the rows; `wide_s` is a step of width 9."""
    made = Speculator(True, 8, Metrics())
    costs = [StepCost(batch=b, width=w, seconds=s) for b in (1, 8) for w, s in ((1, PLAIN_S), (9, wide_s))]
    made.set_target(8, costs, VOCAB, packs_rows=packs_rows)
    made._ngram._rates, made._ngram._seen, made._available = [1.0] * 8, [10_000] * 8, available
    return made


def test_a_round_of_packed_rows_costs_by_its_drafts_and_one_of_padded_rows_by_its_widest() -> None:
    packed, padded = (from_text(packs, 0.090, 0.25) for packs in (True, False))
    assert packed.policy.round_s(8, 8) == pytest.approx(OVERHEAD_S + PLAIN_S + 0.25 * 8 * 0.010)
    wide = 1 - 0.75**8
    assert padded.policy.round_s(8, 8) == pytest.approx(OVERHEAD_S + wide * 0.090 + (1 - wide) * PLAIN_S)
    assert packed.choose_k(8) == padded.choose_k(8) == 0, "ten times the tokens for ten times the time"
    cheap = from_text(True, 0.050, 0.25)
    assert cheap.choose_k(8) > 0
    assert from_text(False, 0.050, 0.25).choose_k(8) == 0


def test_costs_by_the_token_carry_over_to_batches_that_were_not_measured() -> None:
    seed = [StepCost(batch=4, width=w, seconds=0.02 + 0.001 * 4 * w) for w in (1, 2, 4, 8)]
    by_token, by_row = StepCosts(seed, is_by_token=True), StepCosts(seed)
    assert by_token.estimate(32, 1) == pytest.approx(0.02 + 0.001 * 32)
    assert by_token.estimate(32, 4) == pytest.approx(0.02 + 0.001 * 128)
    assert by_token.estimate(4, 3) == by_row.estimate(4, 3) == pytest.approx(0.02 + 0.001 * 12)
    assert by_row.estimate(32, 1) == pytest.approx(0.02 + 0.001 * 4), "as the nearest batch"
    by_token.add(32, 1, 0.104)  # twice as long as it was told: the wide ones take twice as long, too
    assert by_token.estimate(32, 4) == pytest.approx(0.296)
    by_token.add(32, 4, 0.2)
    assert by_token.estimate(32, 4) == pytest.approx(0.2)
    assert StepCosts(is_by_token=True).estimate(8, 2) == 0.0


def test_beside_prefills_packed_drafts_get_a_share_of_the_step() -> None:
    made = from_text(True, 0.020, 0.5)
    alone = made.choose_k(8)
    assert alone > 4
    assert made.choose_k(8, has_prefills=True, max_step_tokens=128) == 4, "16 tokens for 4 rows with drafts"
    assert made.choose_k(8, has_prefills=True, max_step_tokens=16) == 0
    assert made.choose_k(1, has_prefills=True, max_step_tokens=1024) == alone
    assert from_text(False, 0.020, 0.5).choose_k(8, has_prefills=True, max_step_tokens=128) == 0


def test_the_choice_of_k_is_told_of_prompts_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = started()
    told: list[bool] = []
    monkeypatch.setattr(
        rig.core.speculator, "choose_k", lambda batch, has_prefills, max_step_tokens: told.append(has_prefills) or 0
    )
    rig.submit("a", [1, 2], 40)
    assert told[0] is True
    rig.work()
    rig.work()
    del told[:]
    rig.work()
    assert told[0] is False
    del told[:]
    rig.submit("b", [1, 2, 0], 4)
    rig.drain()
    assert any(told), "nobody said that b's prompt waits"
    assert told[-1] is False
    assert rig.tokens("a") == greedy([1, 2], 40)


def test_prompts_are_indexed_while_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "INDEXED_AT_ONCE", 5)
    prompt = [0, 1, 2, 1, 0, 0, 2, 1, 1, 2, 0, 2]
    texts, steps = [], []
    for is_idle in (False, True):
        rig = Rig(worker_info(max_draft_tokens=K), draft_model="ngram", draft_tokens=K)
        rig.start_target()
        rig.submit("a", prompt, 20)
        if is_idle:
            assert [rig.core.work_ahead() for _ in range(4)] == [True, True, True, False]
            index = rig.core.speculator._states[RequestId("a")].index
            assert index is not None
            assert index.tokens == prompt
        rig.drain()
        assert not rig.core.work_ahead()
        texts.append(rig.tokens("a"))
        steps.append(rig.core.session._num_steps)  # type: ignore[union-attr] # a target is ready
    assert texts[0] == texts[1] == greedy(prompt, 20)
    assert steps[0] == steps[1] < 20


def test_nothing_is_indexed_without_drafts_from_text_or_for_a_request_that_is_gone() -> None:
    assert not started().core.work_ahead()
    rig = Rig(worker_info(max_draft_tokens=K), draft_model="ngram")
    rig.start_target()
    rig.submit("a", [0, 1, 2], 20)
    rig.send("front", Cancel(request_id=RequestId("a")))
    rig.drain()
    assert not rig.core.work_ahead()


def test_what_was_held_back_comes_with_a_plain_step_before_drafts_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = started(k=None)
    does_pay = False
    speculator = rig.core.speculator
    monkeypatch.setattr(speculator, "choose_k", lambda batch, *_: K if does_pay and batch else 0)
    monkeypatch.setattr(speculator.policy, "choose", lambda *_: K if does_pay else 0)
    steps: list[Step] = []
    deliver = rig.deliver

    def watched(envelopes: list[Envelope]) -> None:
        steps.extend(m for _, m in envelopes if isinstance(m, Step))
        deliver(envelopes)

    monkeypatch.setattr(rig, "deliver", watched)
    rig.submit("a", [1, 2], 30)
    for _ in range(8):
        rig.work()
    assert not rig.asked
    assert not steps[0].holds_features, "what the policy will say of it is not known yet"
    assert all(step.holds_features for step in steps[2:])
    does_pay = True
    num_held = len(steps)
    while not rig.asked:
        assert rig.work(), "nothing is asked of the drafter"
    plain = steps[num_held:]
    assert [step.holds_features for step in plain] == [False], "one step brings it all"
    assert all(row.num_drafts == 0 for row in plain[0].decodes)
    rig.drain()
    assert not any(step.holds_features for step in steps[num_held:])
    assert any(row.num_drafts for step in steps[num_held:] for row in step.decodes)
    assert rig.tokens("a") == greedy([1, 2], 30)


def test_nothing_is_held_back_without_a_drafter_or_while_drafts_are_forced() -> None:
    made = speculator(0.1, 0.1, 0.0)
    assert made.choose_k(4) == 0
    assert made.holds_features(4)
    made.forced_k = 2
    assert not made.holds_features(4)
    made.forced_k = None
    made.lose_drafter()
    assert not made.holds_features(4)


def test_k_grows_with_acceptance() -> None:
    chosen = [speculator(0.016, 0.001, rate).choose_k(1) for rate in (0.05, 0.3, 0.6, 0.8, 0.95)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    assert chosen[-1] == 7, "one draft more would fill half a padded row more"


@pytest.mark.parametrize(
    ("longest", "tried"), [(1, [1]), (2, [1, 2]), (4, [1, 3, 4]), (6, [1, 3, 6]), (8, [1, 3, 7]), (9, [1, 3, 7, 9])]
)
def test_few_lengths_are_tried_and_none_that_nearly_equals_another(longest: int, tried: list[int]) -> None:
    assert speculator(0.016, 0.001, 0.8, max_draft=longest)._candidates() == tried


@given(
    wide_s=st.floats(0.01, 0.2), draft_s=st.floats(0.0, 0.1), rate=st.floats(0.0, 1.0), batch=st.integers(1, 32)
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_the_chosen_k_is_never_slower_than_plain_and_the_best_there_is(
    wide_s: float, draft_s: float, rate: float, batch: int
) -> None:
    made = speculator(wide_s, draft_s, rate)

    def tokens_per_s(k: int) -> float:
        if k == 0:
            return 1 / PLAIN_S
        expected = 1 + sum(rate**j for j in range(1, k + 1))
        step_s = PLAIN_S + (wide_s - PLAIN_S) * k / 8
        return expected / (step_s + draft_s + speculation.OVERHEAD_S)

    k = made.choose_k(batch)
    assert tokens_per_s(k) >= tokens_per_s(0) * (1 if k == 0 else MIN_GAIN - 0.001)
    assert tokens_per_s(k) >= max(tokens_per_s(j) for j in (0, *made._candidates())) / (MIN_GAIN + 0.001)


def test_a_parked_drafter_is_tried_now_and_then_and_comes_back_when_it_is_worth_it() -> None:
    made = speculator(0.012, 0.001, 0.01)
    rounds, num_results = TRIAL_ROUNDS + TRIAL_ROWS, 6000
    chosen, lost_s = [], 0.0
    for _ in range(num_results):
        k = made.choose_k(1)
        seconds = 0.012 if k else PLAIN_S
        is_steady = bool(chosen) and chosen[-1] == k
        lost_s += seconds - PLAIN_S
        chosen.append(k)
        made.stepped(1, k, 1, seconds, is_steady)
    tried = [i for i, k in enumerate(chosen) if k]
    assert len(tried) >= 2 * rounds, "tried once only"
    assert lost_s < 0.01 * num_results * PLAIN_S
    for _ in range(1000):
        made._neural.add(8, 8)
    made.policy._yield, made.policy._trial = 1.0, None
    ks = []
    for _ in range(CHANGE_AFTER + 4):
        ks.append(made.choose_k(1))
        made.stepped(1, ks[-1], 1, PLAIN_S, True)
    assert not any(ks[:CHANGE_AFTER]), "one result says little: batches come and go"
    assert ks[-1] > 0


def test_rounds_that_were_on_their_way_when_a_trial_ended_are_a_part_of_its_cost() -> None:
    """Plain steps are pipelined: the next one has left when the result of the last one of a trial comes."""
    made = speculator(0.016, 0.001, 0.8)
    policy, candidates = made.policy, made._candidates()
    for _ in range(40):
        policy.finished(8, 7, 8 * 4, 0.018, True, candidates)
    policy._trial, policy._credit_s = Trial(8, 0, 1), 1.0
    policy._trial_cost.clear()
    plain_s = 0.010
    for num_rounds in (1, 2, 3):
        policy.finished(8, 0, 8, plain_s, False, candidates)
        rate = policy.rate(8, policy.best(8, candidates))
        lost_s = num_rounds * (plain_s - 8 / rate)
        assert lost_s > 0.0
        assert policy._trial_cost[8, 0] == pytest.approx(lost_s, rel=0.1)
    assert policy._credit_s == pytest.approx(1.0 - lost_s + 2 * 0.01 * plain_s, rel=0.01)
    policy.finished(8, 7, 8 * 4, 0.018, False, candidates)
    policy.finished(8, 0, 8, plain_s, False, candidates)
    assert policy._trial_cost[8, 0] == pytest.approx(lost_s, rel=0.1), "a plain step that was no part of it"


def test_a_slow_first_draft_does_not_park_the_drafter_for_long() -> None:
    made = speculator(0.012, 0.0, 0.8)
    asked = Asked(draft_id=1, sent=0.0, deadline=9.0, k=4, batch=1, is_catching_up=False)
    made.draft_costs = StepCosts()
    made._measured(asked, 1.9)
    assert made.choose_k(1) == 0
    for _ in range(12):
        made._measured(asked, 0.002)
    assert made.choose_k(1) > 0


@given(outcomes=st.lists(st.integers(0, 4), min_size=200, max_size=300))
@settings(max_examples=50, deadline=None)
def test_acceptance_estimates_stay_chances_and_only_count_what_was_tested(outcomes: list[int]) -> None:
    rates = AcceptanceRates(6)
    for accepted in outcomes:
        rates.add(4, accepted)
    assert all(0.0 <= r <= 1.0 for r in rates._rates)
    assert rates._seen[0] == len(outcomes)
    assert rates._seen[3] == sum(a >= 3 for a in outcomes)
    assert rates._seen[4] == 0
    assert 1.0 <= rates.expected_tokens(4) <= 5.0
