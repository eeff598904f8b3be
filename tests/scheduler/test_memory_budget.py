"""Beyond the soft limit nothing new is taken and caches shrink; beyond the hard one the newest are preempted."""

from __future__ import annotations

import random

import pytest

from scheduler import session
from scheduler.memory_budget import MemoryBudget
from shared.messages import Heartbeat, Release
from tests.scheduler.test_core import Rig
from tests.scheduler.test_prefix import cache_info
from tests.support.fake_target import greedy, worker_info

LIMIT = 1000


def test_no_new_requests_beyond_the_limit_and_again_below_it() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT)
    rig.start_target()

    def tell(instance: str, **memory: int) -> None:
        rig.send(instance, Heartbeat(instance_id=instance, memory_bytes=memory))

    rig.submit("before", [1, 2], 10)
    tell("front", resident=300)
    tell(rig.target_id, resident=200, device=500, device_cache=100)  # the larger counts
    assert rig.core.memory.used_bytes == 900
    tell("front", resident=400)
    rig.submit("beyond", [1, 2], 10)
    assert rig.rejected["beyond"].code == "rate_limit_exceeded"
    assert (rig.rejected["beyond"].retry_after_s or 0) >= 1
    rig.submit("resumed", [1, 2], 10, output_token_ids=greedy([1, 2], 3))
    tell("front", resident=300)
    rig.submit("below", [1, 2], 10)
    rig.assert_idle()
    assert set(rig.rejected) == {"beyond"}
    assert rig.tokens("before") == rig.tokens("below") == greedy([1, 2], 10)
    assert rig.tokens("resumed") == greedy([1, 2], 10)[3:]


def test_a_process_that_is_gone_holds_no_memory() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT)
    rig.start_target()
    rig.send(rig.target_id, Heartbeat(instance_id=rig.target_id, memory_bytes={"resident": 5000}))
    rig.start_target()
    assert rig.core.memory.used_bytes == 0
    rig.submit("a", [1], 3)
    rig.assert_idle()
    assert not rig.rejected


def test_memory_of_the_device_is_not_taken_for_the_machines() -> None:
    """A GPU with as much memory as the machine: what the pools and MLX hold there filled the machine's budget."""
    budget = MemoryBudget(LIMIT)
    budget.note("front", {"resident": 300})
    budget.note("target", {"resident": 200, "device": 900, "device_cache": 50, "device_total": 1000})
    assert (budget.used_bytes, budget.device_used_bytes) == (500, 950)
    assert not budget.is_full
    budget.note("drafter", {"resident": 100, "device": 20, "device_cache": 0, "device_total": 1000})
    assert budget.is_full and budget.is_overfull
    assert str(budget) == "970 of 970 bytes on the device"
    budget.forget("drafter")
    assert not budget.is_full
    budget.note("front", {"resident": 850})
    assert budget.is_full
    assert str(budget) == "1050 of 1000 bytes"


def tell(rig: Rig, used_bytes: int) -> None:
    """The target's heartbeat, then the scheduler's own look at the budget."""
    rig.send(rig.target_id, Heartbeat(instance_id=rig.target_id, memory_bytes={"resident": used_bytes}))
    rig.deliver(rig.core.tick(rig.now))
    rig.core.check_integrity()


def running(rig: Rig) -> list[str]:
    return [s.submit.request_id for s in rig.core.running]


def test_the_hard_limit_preempts_the_newest_until_there_is_room_and_never_the_last_one() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT, memory_hard_limit_bytes=1200)
    rig.start_target()
    for name in "abc":
        rig.submit(name, [1, 2], 20)
        rig.work()
    assert running(rig) == ["a", "b", "c"]
    tell(rig, 1100)
    assert running(rig) == ["a", "b", "c"], "below the hard limit what runs goes on"
    tell(rig, 1250)
    assert running(rig) == ["a", "b"]
    rig.deliver(rig.core.tick(rig.now))
    assert running(rig) == ["a", "b"], "the target has not told yet what this gave"
    tell(rig, 1210)
    tell(rig, 1300)
    tell(rig, 1300)
    assert running(rig) == ["a"]
    for _ in range(6):
        rig.work()
    assert running(rig) == ["a"], "nobody gets a slot beside it"
    tell(rig, 900)
    rig.work()
    assert set(running(rig)) == {"a", "b", "c"}
    rig.assert_idle()
    assert [rig.tokens(name) for name in "abc"] == [greedy([1, 2], 20)] * 3
    assert rig.core.metrics.preemptions._value.get() == 2


def test_those_that_wait_are_served_one_after_the_other_while_memory_stays_short() -> None:
    rig = Rig(worker_info(), memory_limit_bytes=LIMIT)
    rig.start_target()
    for name in "abcdef":
        rig.submit(name, [1, 2], 6)
    tell(rig, 2000)
    tell(rig, 2000)
    tell(rig, 2000)
    assert len(running(rig)) == 1
    while rig.work():
        assert len(running(rig)) <= 1
    rig.assert_idle()
    assert [rig.tokens(name) for name in "abcdef"] == [greedy([1, 2], 6)] * 6


def test_caches_shrink_once_in_a_while_and_those_who_read_them_keep_them() -> None:
    rig = Rig(worker_info(prefix_cache=cache_info("full", 12)), memory_limit_bytes=LIMIT)
    rig.start_target()
    prompt = [1, 2, 0, 1] * 5
    rig.submit("first", prompt, 2)
    rig.drain()
    assert rig.session.prefix is not None
    assert rig.session.prefix.index.num_resident >= 4
    tell(rig, LIMIT)
    assert [m.shrink for m in rig.queue if isinstance(m, Release)] != []
    assert rig.session.prefix.index.num_resident == 0
    rig.drain()
    assert not rig.target.blocks
    tell(rig, LIMIT)
    assert not rig.queue, "not again so soon"
    tell(rig, 0)
    rig.submit("again", prompt, 2)
    rig.drain()
    assert rig.tokens("again") == rig.tokens("first") == greedy(prompt, 2)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_memory_does_each_request_gets_its_own_tokens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "SHRINK_INTERVAL_S", 0.0)
    rng = random.Random(seed)
    rig = Rig(worker_info(prefix_cache=cache_info("full", 12)), memory_limit_bytes=LIMIT, memory_hard_limit_bytes=1200)
    rig.start_target()
    prompts: dict[str, tuple[list[int], int]] = {}
    for i in range(12):
        tell(rig, rng.choice((0, 0, 900)))
        prompts[f"r{i}"] = ([rng.randrange(3) for _ in range(rng.randint(1, 20))], rng.randint(1, 20))
        rig.submit(f"r{i}", *prompts[f"r{i}"])
        for _ in range(rng.randrange(6)):
            rig.work()
            tell(rig, rng.choice((0, 1100, 1300)))
    rig.assert_idle()
    for name, (prompt, max_tokens) in prompts.items():
        assert rig.tokens(name) == greedy(prompt, max_tokens)
