"""The n-gram index and the shared suffix index against naive searches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.ngram import NOTHING, NgramIndex, SharedSuffixIndex
from shared.messages import RequestId

TOKENS = st.lists(st.integers(0, 2), max_size=40)


def naive_source(tokens, min_n, max_n):
    """Position after the latest earlier occurrence of the longest suffix n-gram."""
    for n in range(max_n, min_n - 1, -1):
        for at in range(len(tokens) - 1, n - 1, -1):
            if tokens[at - n : at] == tokens[-n:]:
                return at
    return None


@given(tokens=TOKENS, min_n=st.integers(1, 3), extra=st.integers(0, 3), max_tokens=st.integers(0, 9))
def test_proposal_continues_the_latest_occurrence_of_the_longest_ngram(tokens, min_n, extra, max_tokens):
    index = NgramIndex(min_n, min_n + extra, max_draft_per_match=100)
    index.extend(tokens)
    proposal = index.propose(max_tokens)
    source = naive_source(tokens, min_n, min_n + extra)
    if source is None or max_tokens == 0:
        assert proposal == NOTHING
        return
    copied = list(tokens)
    for i in range(max_tokens):  # a source that reaches the end reads what was just copied
        copied.append(copied[source + i])
    assert proposal.token_ids == copied[len(tokens) :]
    assert tokens[source - proposal.match_length : source] == tokens[len(tokens) - proposal.match_length :]
    assert proposal.match_length >= min_n


@given(parts=st.lists(TOKENS, max_size=5), max_positions=st.integers(1, 60))
def test_what_is_added_in_parts_is_indexed_and_forgotten_as_token_by_token(parts, max_positions):
    by_part, by_token = (NgramIndex(min_n=2, max_n=4, max_positions=max_positions) for _ in "ab")
    for part in parts:
        by_part.extend(part)
        for token in part:
            by_token.append(token)
        assert by_part._after == by_token._after
        assert by_part.tokens == by_token.tokens


@given(tokens=TOKENS)
def test_appending_one_by_one_equals_appending_at_once(tokens):
    one, other = NgramIndex(), NgramIndex()
    one.extend(tokens)
    for token in tokens:
        other.append(token)
        other.propose(3)
    assert one.propose(8) == other.propose(8)


@given(tokens=st.lists(st.integers(0, 2), max_size=60), bound=st.integers(1, 10))
def test_memory_is_bounded_and_recent_occurrences_stay(tokens, bound):
    index = NgramIndex(1, 3, max_positions=bound, max_draft_per_match=100)
    index.extend(tokens)
    assert index.num_entries <= 3 * bound
    source = naive_source(tokens, 1, 3)
    if source is not None and len(tokens) - source < bound:
        assert index.propose(1).token_ids == [tokens[source]]


def test_draft_is_no_longer_than_the_match_allows():
    index = NgramIndex(1, 5, max_draft_per_match=2)
    index.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1, 2])
    assert index.propose(10).token_ids == [3, 4, 5, 6]
    assert index.propose(10).match_length == 2


def test_longer_match_is_more_confident():
    short, long = NgramIndex(), NgramIndex()
    short.extend([5, 1, 2, 9, 7, 1])
    long.extend([5, 1, 2, 9, 7, 5, 1, 2])
    assert short.propose(1).confidence < long.propose(1).confidence < 1


def test_ngram_range_is_checked():
    with pytest.raises(ValueError, match="n-grams"):
        NgramIndex(3, 2)


# ---------------------------------------------------------------- shared index

OUTPUTS = st.lists(st.tuples(st.integers(0, 4), st.lists(st.integers(0, 2), max_size=12)), max_size=20)


@given(writes=OUTPUTS, bound=st.integers(1, 40), sources=st.integers(1, 3))
def test_shared_index_stays_within_its_bound(writes, bound, sources):
    index = SharedSuffixIndex(n=2, max_tokens=bound, max_sources=sources)
    for request, tokens in writes:
        index.append(RequestId(str(request)), tokens, tenant=str(request % 2))
        index.check_integrity()
    for request in range(5):
        index.forget(RequestId(str(request)))
        index.check_integrity()
    assert index.num_tokens == 0


@given(writes=OUTPUTS, context=st.lists(st.integers(0, 2), min_size=2, max_size=12))
def test_shared_proposal_follows_an_occurrence_with_the_longest_match(writes, context):
    index = SharedSuffixIndex(n=2, max_sources=1000, max_draft_per_match=100, min_probability=0)
    outputs: dict[int, list[int]] = {}
    for request, tokens in writes:
        index.append(RequestId(str(request)), tokens)
        outputs.setdefault(request, []).extend(tokens)
    best, successors = 1, []
    for tokens in outputs.values():
        for at in range(2, len(tokens)):
            match = 0
            while match < min(at, len(context)) and tokens[at - 1 - match] == context[-1 - match]:
                match += 1
            if match > best:
                best, successors = match, []
            if match == best:
                successors.append(tokens[at])
    proposal = index.propose(context, 5)
    if best < 2:
        assert proposal == NOTHING
        return
    assert proposal.match_length == best
    most = max(successors.count(t) for t in successors)
    assert successors.count(proposal.token_ids[0]) == most
    assert proposal.confidence == pytest.approx((best + 1) / (best + 2) * most / len(successors))
    # the whole draft stands in one output
    drafted = proposal.token_ids
    assert any(
        tokens[at : at + len(drafted)] == drafted and tokens[at - best : at] == context[len(context) - best :]
        for tokens in outputs.values()
        for at in range(best, len(tokens))
    )


def test_least_recently_written_request_is_forgotten_first():
    index = SharedSuffixIndex(n=2, max_tokens=8)
    index.append(RequestId("old"), [1, 2, 3, 4])
    index.append(RequestId("new"), [5, 6, 7, 8])
    index.append(RequestId("old"), [])  # touched
    index.append(RequestId("third"), [9])
    assert index.propose([1, 2], 1).token_ids == [3]
    assert index.propose([5, 6], 1) == NOTHING


def test_tenants_do_not_see_each_other():
    index = SharedSuffixIndex(n=2)
    index.append(RequestId("a"), [1, 2, 3], tenant="one")
    assert index.propose([1, 2], 1, tenant="one").token_ids == [3]
    assert index.propose([1, 2], 1, tenant="two") == NOTHING


def test_draft_ends_where_the_sources_disagree():
    index = SharedSuffixIndex(n=2, max_draft_per_match=10, min_probability=0.4)
    for i, last in enumerate([7, 8, 9]):
        index.append(RequestId(str(i)), [1, 2, 3, last])
    assert index.propose([1, 2], 5).token_ids == [3]
