"""The null worker keeps the core busy in the shape that is measured."""

from __future__ import annotations

from bench.scheduler import measure


def test_every_slot_decodes_in_every_measured_step() -> None:
    figures = measure(4, 10, 20, 8, churn=False)
    assert figures["rows_per_step"] == 4
    assert figures["handle_s"]["count"] == 20
    assert figures["submit_s"] is None


def test_with_churn_requests_end_and_are_replaced() -> None:
    figures = measure(4, 10, 200, 8, churn=True)
    assert figures["submit_s"]["count"] >= 4 * 200 // 64 - 4
    assert 3 < figures["rows_per_step"] <= 4
