"""What requests that come cost beside the rounds, told from the results alone."""

from __future__ import annotations

import pytest

from scheduler.arrivals import HALF_LIFE_S, ArrivalCosts
from scheduler.round_time import RoundTime

TOKEN_S = 0.001
CHUNK, CHUNK_S = 128, 0.004


def arrive(costs: ArrivalCosts, is_drafting: bool, extra_s: float, now: float, num_prompt_tokens: int = CHUNK) -> None:
    """A request's prompt beside eight rows, `extra_s` beyond what it computes in the round after it, then a round."""
    prompt_s = CHUNK_S * num_prompt_tokens / CHUNK
    costs.decoded(is_drafting, 8, 8 * TOKEN_S, TOKEN_S, True, now)
    costs.prefilled(is_drafting, 1, num_prompt_tokens, 8, 8 * TOKEN_S + prompt_s, TOKEN_S)
    costs.decoded(is_drafting, 8, 8 * TOKEN_S + extra_s, TOKEN_S, False, now)
    costs.decoded(is_drafting, 8, 8 * TOKEN_S, TOKEN_S, True, now)


def test_what_is_beyond_the_rounds_and_the_prompts_own_computing_is_counted_by_request() -> None:
    costs = ArrivalCosts()
    assert costs.per_token == costs.seconds(True, 0.0) == 0.0, "optimistic, so that it is measured"
    for i in range(6):
        arrive(costs, is_drafting=False, extra_s=0.0, now=i, num_prompt_tokens=CHUNK * (1 + i))
        arrive(costs, is_drafting=True, extra_s=0.010, now=i, num_prompt_tokens=CHUNK * (6 - i))
    assert costs.seconds(False, 5.0) == pytest.approx(0.0, abs=1e-4), "however long the prompts were"
    assert costs.seconds(True, 5.0) == pytest.approx(0.010, rel=0.02)
    assert costs.per_token == pytest.approx(1 / 32, rel=0.01)
    assert costs.seconds(True, 5.0 + HALF_LIFE_S) == pytest.approx(0.005, rel=0.02)


def test_a_change_between_drafts_and_none_ends_what_was_being_measured() -> None:
    costs = ArrivalCosts()
    costs.decoded(True, 8, 8 * TOKEN_S, TOKEN_S, True, 1.0)
    costs.prefilled(True, 1, CHUNK, 8, 0.5, TOKEN_S)
    costs.decoded(False, 8, 0.5, TOKEN_S, False, 1.0)
    assert costs.seconds(True, 1.0) == costs.seconds(False, 1.0) == 0.0
    costs.decoded(False, 8, 8 * TOKEN_S, TOKEN_S, True, 1.0)
    assert costs.seconds(True, 1.0) == costs.seconds(False, 1.0) == 0.0


def test_a_prompt_right_behind_a_change_tells_what_the_change_cost() -> None:
    costs = ArrivalCosts()
    costs.decoded(True, 8, 0.1, TOKEN_S, False, 1.0)
    costs.prefilled(True, 1, CHUNK, 8, 0.1, TOKEN_S)
    costs.decoded(True, 8, 8 * TOKEN_S, TOKEN_S, True, 1.0)
    assert costs.seconds(True, 1.0) == 0.0


def test_one_request_that_took_much_longer_counts_little() -> None:
    costs = ArrivalCosts()
    for extra_s in (0.010, 0.011, 0.009, 2.0, 0.010):
        arrive(costs, is_drafting=True, extra_s=extra_s, now=1.0)
    assert costs.seconds(True, 1.0) == pytest.approx(0.012, rel=0.02)


def test_rounds_of_a_server_that_warmed_up_are_forgotten_and_slow_ones_are_averaged() -> None:
    time = RoundTime()
    time.begin_stretch()
    for _ in range(10):
        time.add(0.012)
    time.begin_stretch()
    for seconds in (0.006, 0.006):
        time.add(seconds)
    assert time.value > 0.010
    time.add(0.006)
    assert time.value == pytest.approx(0.006)
    time.begin_stretch()
    for _ in range(3):
        time.add(0.008)
    assert 0.006 < time.value < 0.008, "what is slower may be somebody else's turn"
