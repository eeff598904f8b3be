"""Keys share the engine by weight, whatever each of them sends; within a key nothing changes."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduler.queue_pace import QueuePace
from tests.scheduler.test_core import Rig
from tests.support.fake_target import worker_info


def one_slot(**changes: object) -> Rig:
    rig = Rig(worker_info(num_slots=1), **changes)
    rig.start_target()
    return rig


def order_of_ends(rig: Rig) -> list[str]:
    """Names by when they ended."""
    ended: list[str] = []
    for _ in range(100_000):
        if not rig.work():
            return ended
        ended += [n for n in rig.outputs if rig.finish_reasons(n) and n not in ended]
    raise AssertionError("the schedule does not end")


def test_a_key_with_one_request_waits_for_one_of_the_others_not_for_all() -> None:
    rig = one_slot()
    for i in range(20):
        rig.submit(f"heavy{i}", [1], 5, tenant="heavy")
    rig.submit("light", [1], 5, tenant="light")
    order = order_of_ends(rig)
    assert order.index("light") <= 2
    assert [n for n in order if n != "light"] == [f"heavy{i}" for i in range(20)]
    rig.assert_idle()


def test_shares_follow_tokens_and_weights() -> None:
    from scheduler.core import Core
    from scheduler.metrics import Metrics
    from shared.config import Settings

    rig = one_slot()
    rig.core = Core(Settings(), Metrics(), {"double": 2.0})
    from shared.messages import Hello

    rig.send("front", Hello(role="frontend", instance_id="front", pid=1))
    rig.start_target()
    for i in range(40):
        rig.submit(f"double{i}", [1], 5, tenant="double")
        rig.submit(f"single{i}", [1], 5, tenant="single")
        rig.submit(f"long{i}", [1], 10, tenant="long")
    first = Counter(name.rstrip("0123456789") for name in order_of_ends(rig)[:35])
    assert first["double"] == pytest.approx(20, abs=2)
    assert first["single"] == pytest.approx(10, abs=2)
    assert first["long"] == pytest.approx(5, abs=2)


def test_what_was_not_used_is_given_back() -> None:
    rig = one_slot()
    for i in range(10):  # each may take 50 tokens and takes one
        rig.submit(f"modest{i}", [1], 50, tenant="modest", stop_token_ids=[0, 1, 2])
        rig.submit(f"full{i}", [1], 1, tenant="full")
    first = Counter(name.rstrip("0123456789") for name in order_of_ends(rig)[:10])
    assert first["modest"] >= 3


def test_a_pause_saves_up_nothing() -> None:
    rig = one_slot()
    for i in range(30):
        rig.submit(f"busy{i}", [1], 5, tenant="busy")
        rig.submit(f"early{i}", [1], 5, tenant="other") if i == 0 else None
    for _ in range(60):
        rig.work()
    for i in range(30):
        rig.submit(f"back{i}", [1], 5, tenant="other")
    rest = [n for n in order_of_ends(rig) if n.startswith(("busy", "back"))]
    mixed = Counter(n[:4] for n in rest[-40:-20])
    assert mixed["busy"] >= 6 and mixed["back"] >= 6


def test_priority_is_a_matter_within_one_key() -> None:
    rig = one_slot()
    for i in range(8):
        rig.submit(f"pushy{i}", [1], 5, tenant="pushy", priority=-100)
        rig.submit(f"plain{i}", [1], 5, tenant="plain")
    order = order_of_ends(rig)
    assert Counter(n.rstrip("0123456789") for n in order[:9]) == {"pushy": 5, "plain": 4}


def test_a_full_queue_of_one_key_does_not_shut_others_out() -> None:
    rig = one_slot(max_queue=4)
    for i in range(8):
        rig.submit(f"heavy{i}", [1], 5, tenant="heavy")
    assert set(rig.rejected) == {"heavy5", "heavy6", "heavy7"}
    for i in range(3):
        rig.submit(f"light{i}", [1], 5, tenant="light")
    assert "light0" not in rig.rejected and "light1" not in rig.rejected and "light2" in rig.rejected
    rig.assert_idle()


def test_retry_after_grows_with_the_queue_and_its_pace() -> None:
    pace = QueuePace()
    for now in (10.0, 14.0, 18.0):
        pace.ended(now, num_waiting=3)
    assert pace.interval_s == pytest.approx(4.0)
    pace.ended(30.0, num_waiting=0)
    before = pace.interval_s
    pace.ended(1000.0, num_waiting=1)  # idle in between
    assert pace.interval_s == before
    rig = one_slot(max_queue=8)
    rig.core.queue_pace.interval_s = 4.0
    for i in range(10):
        rig.submit(f"r{i}", [1], 5)
    assert rig.rejected["r9"].retry_after_s == pytest.approx(16.0)
    rig.assert_idle()
