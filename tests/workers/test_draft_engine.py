"""What the draft engine keeps of features that come twice, late, with gaps, or from a target that started again."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import DraftRow, FeatureRows
from workers.draft_engine import DraftEngine
from workers.drafters.base import Drafter, Drafts
from workers.drafters.context import ContextState

pytestmark = pytest.mark.mlx

TEXT = [(7 * i + 3) % 50 for i in range(40)]


class Recorder(Drafter):
    """Checks that every row it is given is that of its position: the feature of position p is [p, p]."""

    max_draft_tokens = 4

    def new_state(self, start=0):
        return ContextState(start)

    def truncate(self, state, length):
        raise AssertionError("nothing here goes back")

    def extend_rows(self, states, features, token_ids):
        first = 0
        for state, tokens in zip(states, token_ids, strict=True):
            n = len(tokens)
            rows, first = features[first : first + n], first + n
            assert rows.shape == (n, 2), "features and tokens of different lengths"
            assert rows[:, 0].tolist() == list(range(state.length, state.length + n)), "rows of other positions"
            assert tokens == TEXT[state.length : state.length + n], "tokens of other positions"
            state.length += n

    def can_draft(self, state):
        return True

    def draft(self, states, anchors, num_tokens, sampler=None):
        for state, anchor in zip(states, anchors, strict=True):
            assert TEXT[state.length] == anchor, "the anchor is not behind the context"
        return Drafts(mx.zeros((len(states), num_tokens), mx.int32))


def feed(engine, start, end, request="a"):
    rows = np.repeat(np.arange(start, end, dtype=np.float32)[:, None], 2, axis=1)
    engine.take_features(FeatureRows(request_id=request, start=start, num_rows=end - start), rows)


def ask(engine, sent, anchor, request="a"):
    row = DraftRow(request_id=request, start=sent, token_ids=TEXT[sent : anchor + 1], num_tokens=3)
    engine.take_tokens(row)
    (draft,) = engine.draft([row])
    assert draft.anchor == anchor
    return len(draft.token_ids)


@pytest.fixture
def engine():
    return DraftEngine(Recorder(), needs_features=True)


def test_in_order(engine):
    feed(engine, 0, 5)
    assert ask(engine, 0, 5) == 3
    feed(engine, 5, 7)
    assert ask(engine, 6, 7) == 3


def test_what_wants_no_drafts_is_taken_in(engine):
    feed(engine, 0, 8)
    row = DraftRow(request_id="a", start=0, token_ids=TEXT[:9], num_tokens=0)
    engine.take_tokens(row)
    (draft,) = engine.draft([row])
    assert (draft.anchor, draft.token_ids) == (8, [])
    assert engine._sequences["a"].state.length == 8
    feed(engine, 8, 9)
    assert ask(engine, 9, 9) == 3


def test_nothing_is_drafted_before_the_features_have_come(engine):
    feed(engine, 0, 4)
    assert ask(engine, 0, 5) == 0
    feed(engine, 4, 5)
    assert ask(engine, 5, 5) == 3


def test_a_target_that_starts_again_sends_what_is_there_and_goes_on(engine):
    feed(engine, 0, 6)
    assert ask(engine, 0, 6) == 3
    feed(engine, 0, 4)
    feed(engine, 4, 9)
    assert ask(engine, 7, 9) == 3


def test_after_a_gap_the_context_begins_anew(engine):
    feed(engine, 0, 4)
    feed(engine, 6, 9)
    assert ask(engine, 0, 9) == 3


def test_a_late_request_whose_anchor_lies_before_the_new_context_gets_nothing_and_harms_nothing(engine):
    """The target went on without drafts and rows were lost: the context starts after the anchor of an old request."""
    feed(engine, 8, 10)
    assert ask(engine, 0, 5) == 0
    assert ask(engine, 6, 10) == 3


def test_an_anchor_before_what_was_taken_in_gets_nothing_and_harms_nothing(engine):
    feed(engine, 0, 8)
    assert ask(engine, 0, 8) == 3
    assert ask(engine, 0, 5) == 0
    feed(engine, 8, 9)
    assert ask(engine, 0, 9) == 3


def test_features_of_an_ended_request_are_not_kept(engine):
    engine.end(["a"])
    feed(engine, 0, 4)
    assert not engine._sequences


def test_rows_of_tokens_that_a_lost_target_never_committed_are_forgotten(engine):
    feed(engine, 0, 5)
    assert ask(engine, 0, 5) == 3  # tokens 0..5 are committed
    feed(engine, 5, 9)
    engine.use_epoch(2)
    feed(engine, 0, 4)  # the new target starts again, and has not come to position 6 yet
    assert ask(engine, 6, 8) == 0
    feed(engine, 4, 8)
    assert ask(engine, 9, 8) == 3


def test_a_new_target_leaves_a_context_that_was_not_asked_for_empty(engine):
    feed(engine, 3, 6)
    engine.use_epoch(2)
    feed(engine, 0, 4)
    assert ask(engine, 0, 4) == 3


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(-4, 3), st.integers(1, 6)),
            st.tuples(st.just("ask"), st.integers(0, 5)),
            st.tuples(st.just("again")),
            st.tuples(st.just("forget")),
            st.tuples(st.just("epoch")),
        ),
        max_size=30,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_order_of_features_and_requests_keeps_rows_and_positions_together(events):
    """`feed` starts before, at, or after the last row sent; anchors never go back."""
    engine, sent, end, anchor = DraftEngine(Recorder(), needs_features=True), 0, 0, 0
    for event in events:
        match event:
            case ("feed", shift, n):
                start = max(0, min(end + shift, len(TEXT) - 7))
                feed(engine, start, start + n)
                end = start + n
            case ("ask", further):
                anchor = min(anchor + further, len(TEXT) - 1)
                ask(engine, min(sent, anchor), anchor)
                sent = anchor + 1
            case ("epoch",):
                engine.use_epoch(engine.target_epoch + 1)
            case ("again",):
                end = 0
            case ("forget",):
                engine.reset()
                sent = 0
