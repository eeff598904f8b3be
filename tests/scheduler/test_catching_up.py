"""Rows of which the drafter has much to take in: they wait for it, and nobody else does."""

from __future__ import annotations

from tests.scheduler.test_speculation import DraftRig, K, started
from tests.support.fake_target import greedy, worker_info


def two_that_draft_and_one_that_begins() -> DraftRig:
    """Its prompt is computed; what the others get is asked for, nothing answered yet."""
    rig = started(info=worker_info(max_draft_tokens=K, kv_capacity_tokens=256))
    for name in ("a", "b"):
        rig.submit(name, [1, 2], 60)
    while len(rig.tokens("a")) < 2 * K:
        assert rig.work() or rig.answer()
    rig.submit("c", [2] * 30, 30)
    while not rig.tokens("c"):
        assert rig.work() or rig.answer()
    while rig.work():
        pass
    return rig


def test_a_request_that_begins_holds_up_nobody_who_has_drafts() -> None:
    rig = two_that_draft_and_one_that_begins()
    main, ahead = rig.asked
    assert [(row.request_id, row.num_tokens) for row in main.rows] == [("a", K), ("b", K)]
    assert [(row.request_id, row.num_tokens) for row in ahead.rows] == [("c", 0)]
    before = len(rig.tokens("c"))
    rig.answer()
    assert rig.work(), "the target verifies while the drafter takes the prompt in"
    assert len(rig.tokens("c")) == before + 1, "it had no drafts"
    assert len(rig.asked) == 2
    rig.answer()
    (following,) = rig.asked
    rows = {row.request_id: row for row in following.rows}
    assert set(rows) == {"a", "b", "c"} and len(rows["c"].token_ids) == 1, "the rest is known"
    rig.drain()
    assert rig.tokens("c") == greedy([2] * 30, 30)
    assert rig.core.metrics.fallthrough["stale"]._value.get() == 0


def test_an_answer_to_what_was_taken_in_may_be_lost() -> None:
    rig = two_that_draft_and_one_that_begins()
    rig.answer()
    rig.work()
    rig.answer("never")
    assert rig.core.speculator._ahead
    rig.answer()
    assert not rig.core.speculator._ahead, "the drafter works in the order of the requests"
    rig.drain()
    assert rig.tokens("c") == greedy([2] * 30, 30)


def test_where_nobody_has_drafts_a_request_that_begins_is_waited_for() -> None:
    rig = started()
    rig.submit("a", [1] * 30, 20)
    while not rig.asked:
        assert rig.work()
    (only,) = rig.asked
    assert [row.num_tokens for row in only.rows] == [K]
    assert not rig.work(), "it waits for its drafts"
