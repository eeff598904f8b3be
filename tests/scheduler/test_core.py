"""The core against a fake target: random schedules, and the rules of a request's life."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import Core
from scheduler.metrics import Metrics
from scheduler.outbox import Envelope
from scheduler.session import Session
from shared.config import Settings
from shared.messages import (
    Cancel,
    EngineStatus,
    Hello,
    LoadBlocks,
    Message,
    Output,
    Outputs,
    Ready,
    Rejected,
    Release,
    RequestId,
    SamplingParams,
    SayHello,
    Step,
    StepResult,
    Submit,
    Welcome,
    WorkerInfo,
)
from tests.support.fake_target import FakeTarget, greedy, worker_info

GREEDY = SamplingParams(temperature=0.0)


class Rig:
    """A core, one frontend and a fake target; messages to the target wait in `queue` until `work` runs one."""

    def __init__(self, info: WorkerInfo | None = None, **changes: object) -> None:
        self.core = Core(Settings(**{"draft_model": "none", **changes}), Metrics())  # type: ignore[arg-type]
        self.info = info or worker_info()
        self.now = 100.0
        self.outputs: dict[str, list[Output]] = {}
        self.rejected: dict[str, Rejected] = {}
        self.status: EngineStatus | None = None
        self.num_targets = 0
        self.is_host_bound = False  # targets are given steps as if their hosts were the limit
        self.queue: deque[Step | Release | LoadBlocks] = deque()
        self.send("front", Hello(role="frontend", instance_id="front", pid=1))

    def send(self, sender: str, message: Message) -> None:
        self.now += 0.001
        self.deliver(self.core.handle(sender, message, self.now))
        self.core.check_integrity()

    def deliver(self, envelopes: list[Envelope]) -> None:
        for receiver, message in envelopes:
            match message:
                case Outputs():
                    for output in message.outputs:
                        self.outputs.setdefault(output.request_id, []).append(output)
                case Rejected():
                    self.rejected[message.request_id] = message
                case EngineStatus():
                    self.status = message
                case Step() | Release() | LoadBlocks():
                    assert receiver == self.target_id
                    self.queue.append(message)
                case Welcome() if receiver.startswith("target"):
                    self.epoch = message.epoch

    @property
    def target_id(self) -> str:
        return f"target{self.num_targets}"

    @property
    def session(self) -> Session:
        assert self.core.session is not None, "no target is ready"
        return self.core.session

    def start_target(self, last_exit: int | None = 0) -> None:
        """A new target process; `last_exit` is how the one before it ended."""
        self.num_targets += 1
        self.queue.clear()
        self.target = FakeTarget(self.info)
        hello = Hello(role="target", instance_id=self.target_id, pid=2, last_exit=last_exit)
        self.send(self.target_id, hello)
        self.send(self.target_id, Ready(epoch=self.epoch, info=self.info))
        if self.is_host_bound:
            self.session._look_ahead._device_share, self.target.phases = 0.0, {"build": 0.001}

    def work(self) -> bool:
        """Let the target handle one message."""
        if not self.queue:
            return False
        message = self.queue.popleft()
        if isinstance(message, Release):
            self.target.release(message)
        elif isinstance(message, LoadBlocks):
            self.send(self.target_id, self.target.load(message))
        else:
            self.send(self.target_id, self.target.run(message))
        return True

    def drain(self) -> None:
        for _ in range(100_000):
            if not self.work():
                return
        raise AssertionError("the schedule does not end")

    def submit(self, name: str, prompt: list[int], max_tokens: int, **changes: object) -> None:
        values = {"sampling": GREEDY, **changes}
        submit = Submit(request_id=RequestId(name), prompt_token_ids=prompt, max_tokens=max_tokens, **values)  # type: ignore[arg-type]
        self.send("front", submit)

    def tokens(self, name: str) -> list[int]:
        return [t for output in self.outputs.get(name, []) for t in output.token_ids]

    def finish_reasons(self, name: str) -> list[str]:
        return [o.finish_reason for o in self.outputs.get(name, []) if o.finish_reason]

    def assert_idle(self) -> None:
        self.drain()
        assert not self.core.running and not len(self.core.waiting)
        assert self.session.slots.used_tokens == 0
        assert self.session.slots.num_free_slots == self.info.num_slots
        assert not self.target.slots, "the target still holds slots"


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=30)
EVENT = st.one_of(
    st.tuples(st.just("submit"), TOKENS, st.integers(1, 30), st.integers(-2, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 40)),
    st.tuples(st.just("work"), st.integers(1, 12)),
    st.tuples(st.just("restart")),
    st.tuples(st.just("tick")),
)


@given(
    events=st.lists(EVENT, max_size=60),
    slots=st.integers(1, 5),
    kv=st.sampled_from([64, 72, 128, 1000]),
    is_host_bound=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_random_schedules_give_each_request_its_own_greedy_tokens_and_one_terminal_message(
    events: list[tuple[object, ...]], slots: int, kv: int, is_host_bound: bool
) -> None:
    rig = Rig(worker_info(num_slots=slots, kv_capacity_tokens=kv, queues_steps=True), max_queue=12)
    rig.is_host_bound = is_host_bound
    rig.start_target()
    submitted: dict[str, tuple[list[int], int]] = {}
    cancelled: set[str] = set()
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
    rig.assert_idle()
    for name, (prompt, max_tokens) in submitted.items():
        expected = greedy(prompt, max_tokens)
        if name in rig.rejected:
            assert name not in rig.outputs
            continue
        (reason,) = rig.finish_reasons(name)
        if reason == "length":
            assert rig.tokens(name) == expected
        else:
            assert reason == "abort" and name in cancelled
            assert rig.tokens(name) == expected[: len(rig.tokens(name))]


def test_decode_is_pipelined_the_next_step_leaves_before_the_last_result_comes() -> None:
    rig = Rig()
    rig.start_target()
    rig.submit("a", [1, 2, 0], 10)
    steps = [m for m in rig.queue if isinstance(m, Step)]
    assert len(steps) == 2
    assert steps[0].prefills[0].token_ids == [1, 2, 0]
    assert steps[1].decodes[0].token_ids is None and steps[1].decodes[0].start == 3


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    rig = Rig(worker_info(max_step_tokens=8, kv_capacity_tokens=200))
    rig.start_target()
    rig.submit("short", [1], 20)
    rig.work()
    rig.submit("long", [0] * 30, 2)
    mixed = []
    while rig.queue:
        head = rig.queue[0]
        if isinstance(head, Step) and head.prefills and head.decodes:
            mixed.append((len(head.decodes), len(head.prefills[0].token_ids or [])))
        rig.work()
    assert mixed[:4] == [(1, 7), (1, 7), (1, 7), (1, 7)]
    assert rig.tokens("long") == greedy([0] * 30, 2)


def test_the_end_of_a_prompt_is_not_cut_off_for_a_few_tokens() -> None:
    rig = Rig(worker_info(max_step_tokens=16, kv_capacity_tokens=200))
    rig.start_target()
    rig.submit("short", [1], 20)
    rig.work()
    rig.submit("whole", [0] * 16, 2)
    rig.submit("two steps", [0] * 17, 2)
    widths = []
    while rig.queue:
        head = rig.queue[0]
        if isinstance(head, Step) and head.prefills:
            widths.append([len(row.token_ids or []) for row in head.prefills])
        rig.work()
    assert widths == [[16], [14], [3]]
    assert rig.tokens("whole") == greedy([0] * 16, 2)
    assert rig.tokens("two steps") == greedy([0] * 17, 2)


def test_priority_runs_first_and_ageing_lets_nobody_starve() -> None:
    rig = Rig(worker_info(num_slots=1), priority_ageing_s=1.0)
    rig.start_target()
    rig.submit("running", [0], 3)
    rig.submit("background", [1], 3, priority=5)
    rig.submit("urgent", [2], 3, priority=0)
    order = [s.submit.request_id for s in sorted(rig.core.waiting, key=lambda s: s.order)]
    assert order == ["urgent", "background"]
    rig.now += 6.0
    rig.submit("late", [2, 2], 3, priority=0)
    order = [s.submit.request_id for s in sorted(rig.core.waiting, key=lambda s: s.order)]
    assert order == ["urgent", "background", "late"]
    rig.assert_idle()


def test_when_capacity_runs_short_the_newest_is_preempted_and_recomputed() -> None:
    rig = Rig(worker_info(num_slots=3, kv_capacity_tokens=80, capacity_classes=[8, 64], max_step_tokens=64))
    rig.start_target()
    rig.submit("first", [0, 1], 40)
    rig.submit("second", [1, 1], 40)
    rig.drain()
    assert rig.tokens("first") == greedy([0, 1], 40)
    assert rig.tokens("second") == greedy([1, 1], 40)
    timings = {n: rig.outputs[n][-1].timings for n in ("first", "second")}
    assert timings["first"] is not None and timings["first"].num_preemptions == 0
    assert timings["second"] is not None and timings["second"].num_preemptions >= 1


def test_stop_tokens_end_the_output_and_min_tokens_delays_them() -> None:
    rig = Rig()
    rig.start_target()
    expected = greedy([1, 2], 30)
    rig.submit("a", [1, 2], 30, stop_token_ids=[expected[4]])
    rig.submit("b", [1, 2], 30, stop_token_ids=[0, 1, 2], min_tokens=7)
    rig.drain()
    assert rig.tokens("a") == expected[: expected.index(expected[4]) + 1]
    assert rig.tokens("b") == expected[:8]
    assert rig.finish_reasons("a") == rig.finish_reasons("b") == ["stop"]


@pytest.mark.parametrize("num_worked", [0, 1, 2, 3, 5])
def test_cancel_frees_the_slot_by_the_next_step_in_every_state(num_worked: int) -> None:
    rig = Rig(worker_info(max_step_tokens=8))
    rig.start_target()
    rig.submit("a", [0] * 20, 20)
    for _ in range(num_worked):
        rig.work()
    rig.send("front", Cancel(request_id=RequestId("a")))
    assert rig.session.slots.num_free_slots == rig.info.num_slots
    assert rig.finish_reasons("a") == ["abort"]
    rig.assert_idle()


def test_a_full_queue_answers_busy_with_a_time() -> None:
    rig = Rig(worker_info(num_slots=1), max_queue=2)
    rig.start_target()
    for i in range(4):
        rig.submit(f"r{i}", [0], 5)
    assert set(rig.rejected) == {"r3"}
    assert rig.rejected["r3"].code == "rate_limit_exceeded"
    assert (rig.rejected["r3"].retry_after_s or 0) >= 1.0


def test_too_long_says_the_numbers() -> None:
    rig = Rig()
    rig.start_target()
    rig.submit("a", [0] * 60, 5)
    assert rig.rejected["a"].code == "context_length_exceeded"
    assert "65" in rig.rejected["a"].message and "64" in rig.rejected["a"].message


def test_a_request_accepted_before_waits_for_the_target_even_without_a_token() -> None:
    rig = Rig()
    rig.submit("a", [1], 5, is_resumed=True)
    assert not rig.rejected
    rig.start_target()
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1], 5)


def test_without_a_target_a_request_is_refused_and_a_resumed_one_waits() -> None:
    rig = Rig()
    expected = greedy([1], 6)
    rig.submit("new", [1], 6)
    rig.submit("resumed", [1], 6, output_token_ids=expected[:2])
    assert rig.rejected["new"].code == "service_unavailable"
    rig.start_target()
    rig.drain()
    assert rig.tokens("resumed") == expected[2:]


def test_a_new_target_continues_every_stream_where_it_was() -> None:
    rig = Rig()
    rig.start_target()
    for name, prompt in (("a", [0, 1, 2]), ("b", [2, 2])):
        rig.submit(name, prompt, 20)
    for _ in range(6):
        rig.work()
    seen = len(rig.tokens("a"))
    assert 0 < seen < 20
    rig.start_target()
    rig.drain()
    assert rig.tokens("a") == greedy([0, 1, 2], 20)
    assert rig.tokens("b") == greedy([2, 2], 20)


def test_results_of_an_older_epoch_or_step_are_dropped_and_counted() -> None:
    rig = Rig()
    rig.start_target()
    rig.submit("a", [1], 5)
    stale = StepResult(epoch=rig.epoch - 1, step_id=1, rows=[], phases={})
    rig.send(rig.target_id, stale)
    rig.send(rig.target_id, StepResult(epoch=rig.epoch, step_id=99, rows=[], phases={}))
    assert rig.core.metrics.dropped["old_epoch"]._value.get() == 1
    assert rig.core.metrics.dropped["unexpected"]._value.get() == 1
    rig.drain()
    assert rig.tokens("a") == greedy([1], 5)


def test_a_stranger_is_asked_to_say_hello() -> None:
    rig = Rig()
    assert rig.core.handle("stranger", Cancel(request_id=RequestId("x")), 1.0) == [("stranger", SayHello())]


def test_a_silent_frontend_loses_its_requests_and_a_silent_target_makes_them_wait() -> None:
    rig = Rig(heartbeat_timeout_s=5.0)
    rig.start_target()
    rig.submit("a", [1], 30)
    rig.now += 4.0
    rig.send("front", Cancel(request_id=RequestId("nothing")))
    rig.now += 3.0  # the target was silent for 7 s, the frontend for 3 s
    rig.deliver(rig.core.tick(rig.now))
    rig.core.check_integrity()
    assert rig.status is not None and rig.status.target == "absent"
    assert len(rig.core.waiting) == 1
    rig.now += 6.0
    rig.deliver(rig.core.tick(rig.now))
    assert not len(rig.core.waiting)
    assert rig.finish_reasons("a") == ["abort"]


def test_shutdown_ends_every_request_with_one_error() -> None:
    rig = Rig(worker_info(num_slots=1))
    rig.start_target()
    rig.submit("running", [1], 30)
    rig.submit("waiting", [1], 30)
    rig.deliver(rig.core.shutdown(rig.now))
    for name in ("running", "waiting"):
        assert rig.finish_reasons(name) == ["error"]
        assert rig.outputs[name][-1].error


def test_a_request_past_its_time_limit_ends_with_an_error() -> None:
    rig = Rig()
    rig.submit("a", [1], 30, timeout_s=2.0, output_token_ids=[1])
    rig.now += 3.0
    rig.deliver(rig.core.tick(rig.now))
    assert rig.finish_reasons("a") == ["error"]


def test_a_failed_row_ends_its_request_alone() -> None:
    rig = Rig()
    rig.start_target()
    rig.submit("bad", [1], 5)
    rig.submit("good", [2], 5)
    original = rig.target.run

    def run(step: Step) -> StepResult:
        result = original(step)
        slot = next((s.slot for s in step.starts if s.request_id == "bad"), None)
        rows = [r if r.slot != slot else type(r)(slot=r.slot, token_ids=[], error="NaN") for r in result.rows]
        return StepResult(epoch=result.epoch, step_id=result.step_id, rows=rows, phases={})

    rig.target.run = run  # type: ignore[method-assign]
    rig.drain()
    assert rig.finish_reasons("bad") == ["error"]
    assert rig.tokens("good") == greedy([2], 5)


def test_the_ttft_bound_lets_prefill_go_first() -> None:
    rig = Rig(worker_info(max_step_tokens=4, num_slots=2), ttft_bound_s=1.0)
    rig.start_target()
    rig.submit("decoding", [1], 30)
    rig.work()
    rig.submit("late", [0] * 12, 2)
    rig.now += 2.0
    rig.work()
    rig.work()
    late_steps = [m for m in rig.queue if isinstance(m, Step)]
    assert late_steps and not late_steps[-1].decodes and late_steps[-1].prefills
    rig.assert_idle()


@pytest.mark.parametrize("queues_steps", [False, True])
def test_the_time_of_a_step_is_that_from_the_result_before_it_to_its_own(queues_steps: bool) -> None:
    rig = Rig()
    rig.info = msgspec.structs.replace(rig.info, queues_steps=queues_steps)
    rig.start_target()
    rig.submit("a", [1], 20)
    for _ in range(12):
        rig.now += 0.049  # and 0.001 with each message
        rig.work()
    assert rig.core.speculator.policy.round_s(1, 0) == pytest.approx(0.05)
    alone_s = rig.core.speculator.costs.estimate(1, 1)
    if queues_steps:
        assert alone_s == 0.0, "one that hides behind another tells nothing of one alone"
    else:
        assert alone_s == pytest.approx(0.05)


def test_requests_that_other_weights_have_begun_are_not_continued() -> None:
    rig = Rig()
    rig.start_target()
    rig.submit("a", [1, 2], 10)
    rig.work()
    rig.start_target()
    assert not rig.finish_reasons("a"), "the same weights go on"
    rig.info = msgspec.structs.replace(rig.info, fingerprint="another")
    rig.start_target()
    (last,) = [o for o in rig.outputs["a"] if o.finish_reason is not None]
    assert (last.finish_reason, last.error) == ("error", "the model was changed while the request was running")
    rig.submit("b", [1, 2], 10)
    rig.assert_idle()
    assert rig.tokens("b") == greedy([1, 2], 10)
