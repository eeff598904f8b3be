"""A request that brings the target down fails alone; those beside it, and those that were merely there, do not."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PoisonRequest
from shared.messages import RequestId, Step, WorkerFailed
from tests.scheduler.test_core import Rig
from tests.support.fake_target import greedy, worker_info

SEGFAULT = -signal.SIGSEGV
KILLED = -signal.SIGKILL


class PoisonRig(Rig):
    """A target that dies when it gets a row of the request named "poison"."""

    num_deaths = 0
    poison_slot: int | None = None
    last_exit: int | None = SEGFAULT

    def work(self) -> bool:
        if self.queue and isinstance(step := self.queue[0], Step):
            for start in step.starts:
                if start.request_id == "poison":
                    self.poison_slot = start.slot
                elif start.slot == self.poison_slot:
                    self.poison_slot = None
            if self.poison_slot in [row.slot for row in (*step.decodes, *step.prefills)]:
                self.num_deaths += 1
                self.poison_slot = None
                self.start_target(self.last_exit)
                return True
        return super().work()


def error_of(rig: Rig, name: str) -> tuple[str | None, str | None]:
    last = rig.outputs[name][-1]
    return last.finish_reason, last.error_code


@given(order=st.permutations(["a", "b", "c", "poison"]), num_worked=st.lists(st.integers(0, 8), min_size=4, max_size=4))
@settings(max_examples=150, deadline=None)
def test_a_poison_request_fails_alone_after_two_crashes(order: list[str], num_worked: list[int]) -> None:
    rig = PoisonRig(worker_info(num_slots=4, kv_capacity_tokens=1000, max_step_tokens=16))
    rig.start_target()
    prompts = {name: [len(name), 1, i] * (1 + 3 * i) for i, name in enumerate(order)}
    for name, steps in zip(order, num_worked, strict=True):
        rig.submit(name, [t % 3 for t in prompts[name]], 12)
        for _ in range(steps):
            rig.work()
    rig.assert_idle()
    assert rig.num_deaths == 2
    assert error_of(rig, "poison") == ("error", PoisonRequest.code)
    for name in ("a", "b", "c"):
        assert rig.finish_reasons(name) == ["length"]
        assert rig.tokens(name) == greedy([t % 3 for t in prompts[name]], 12)
    assert not rig.core.suspects


def test_deaths_by_a_signal_from_outside_take_four() -> None:
    rig = PoisonRig(worker_info())
    rig.last_exit = KILLED
    rig.start_target()
    rig.submit("poison", [1], 5)
    rig.assert_idle()
    assert rig.num_deaths == 4
    assert error_of(rig, "poison") == ("error", PoisonRequest.code)


@pytest.mark.parametrize(("last_exit", "num_deaths"), [(SEGFAULT, 2), (1, 2), (KILLED, 4)])
def test_a_death_that_was_seen_as_silence_counts_as_what_it_was(last_exit: int, num_deaths: int) -> None:
    """Where the next process takes longer to say hello than the heartbeat's time-out."""
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("poison", [1], 5)
    rig.submit("waiting", [2], 5)
    for number in range(1, num_deaths + 1):
        assert rig.queue, f"given up before death {number}"
        rig.now += rig.core.settings.heartbeat_timeout_s + 1
        rig.core.peers.by_id("front").last_seen = rig.now
        rig.deliver(rig.core.tick(rig.now))
        assert rig.status is not None and rig.status.target == "absent"
        rig.start_target(last_exit)
    assert error_of(rig, "poison") == ("error", PoisonRequest.code)


def test_a_target_that_was_only_silent_is_blamed_on_nobody() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1], 5)
    for code in (0, -signal.SIGTERM) * 5:
        rig.now += rig.core.settings.heartbeat_timeout_s + 1
        rig.core.peers.by_id("front").last_seen = rig.now
        rig.deliver(rig.core.tick(rig.now))
        rig.start_target(code)
        assert not rig.core.suspects
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1], 5)


def test_requests_that_go_on_between_crashes_are_never_given_up() -> None:
    rig = Rig(worker_info(num_slots=3))
    rig.start_target()
    for name in ("a", "b"):
        rig.submit(name, [1, 2], 30)
    for _ in range(10):
        for _ in range(10):
            rig.work()
        rig.start_target(SEGFAULT)
    rig.assert_idle()
    assert rig.tokens("a") == rig.tokens("b") == greedy([1, 2], 30)


def test_orderly_restarts_count_for_nothing() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1], 5)
    for code in (0, -signal.SIGTERM) * 5:
        rig.start_target(code)
    assert not rig.core.suspects
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1], 5)


def test_an_exception_in_the_worker_counts_once_though_it_is_told_twice() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1], 5)
    rig.send(rig.target_id, WorkerFailed(epoch=rig.epoch, reason="out of memory"))
    rig.start_target(1)
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1], 5)


@pytest.mark.parametrize("num_steps", [5, 100])
def test_a_step_that_does_not_end_has_its_target_replaced(num_steps: int) -> None:
    rig = Rig(worker_info(max_model_len=1000, kv_capacity_tokens=1000, capacity_classes=[1000]), step_timeout_s=60.0)
    rig.start_target()
    rig.submit("a", [1], 300)
    for _ in range(num_steps):
        rig.work()
    limit = 10.0 if num_steps == 100 else 60.0  # with nothing known about the steps: the setting
    started = rig.now

    def tick_at(now: float) -> list[int]:
        for peer in rig.core.peers.all():
            peer.last_seen = now  # heartbeats go on: they come from a thread of their own
        rig.deliver(rig.core.tick(now))
        return rig.core.hung

    assert tick_at(started + limit - 1) == []
    assert tick_at(started + limit + 1) == [2]
    assert rig.status is not None and rig.status.target == "absent"
    rig.start_target()
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1], 300)


def test_the_limit_of_a_step_grows_with_its_tokens() -> None:
    from scheduler.step_timeout import FACTOR, NUM_LEARNING_STEPS, StepTimeout

    timeout = StepTimeout(1000.0)
    for _ in range(NUM_LEARNING_STEPS):
        assert timeout.limit_s(1) == 1000.0
        timeout.observe(10, 0.8)
    assert timeout.limit_s(10) == pytest.approx(FACTOR * 0.8)
    assert timeout.limit_s(100) == pytest.approx(FACTOR * 8.0)
    assert timeout.limit_s(1_000_000) == 1000.0
    timeout.reset()
    assert timeout.limit_s(1) == 1000.0


def test_cancelling_a_suspect_forgets_it() -> None:
    from shared.messages import Cancel

    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1], 5)
    rig.start_target(SEGFAULT)
    assert len(rig.core.suspects) == 1
    rig.send("front", Cancel(request_id=RequestId("a")))
    assert not rig.core.suspects
    rig.assert_idle()
