"""A third step lies ready at a target whose host is the limit, and at no other."""

from __future__ import annotations

import pytest

from scheduler.look_ahead import LookAhead
from shared.messages import Step
from tests.scheduler.test_core import Rig
from tests.support.fake_target import greedy, worker_info

HOST, DEVICE = {"build": 0.005, "device": 0.0001}, {"build": 0.005, "device": 0.003}


def after(phases: dict[str, float], num: int = 60, *, queues_steps: bool = True, is_alone: bool = False) -> int:
    look_ahead = LookAhead(queues_steps)
    for _ in range(num):
        look_ahead.finished(phases, is_alone)
    return look_ahead.num_steps


def test_the_limit_is_told_by_what_is_waited_for() -> None:
    assert after(HOST) == 3
    assert after(DEVICE) == 2
    assert after(HOST, num=5) == 2, "a few steps say little"
    assert after({}) == 2


def test_steps_that_hide_nothing_and_cpus_tell_nothing() -> None:
    assert after(HOST, is_alone=True) == 2
    assert after(HOST, queues_steps=False) == 2


@pytest.mark.parametrize(("phases", "num_steps"), [(HOST, 3), (DEVICE, 2)])
def test_so_many_steps_wait_at_the_target(phases: dict[str, float], num_steps: int) -> None:
    rig = Rig(worker_info(queues_steps=True))
    rig.start_target()
    rig.target.phases = phases
    rig.submit("a", [1, 2], 60)
    for _ in range(50):
        rig.work()
    assert len([message for message in rig.queue if isinstance(message, Step)]) == num_steps
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1, 2], 60)
