"""Speculation counters out of a metrics page."""

from __future__ import annotations

import pytest

from tandem.draft_counters import DraftCounters, parse, total

PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Rows.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{drafter="ngram",engine="0",model_name="m {x}"} 10.0
vllm:spec_decode_num_drafts_total{drafter="eagle3",engine="0",model_name="m"} 4.0
vllm:spec_decode_num_drafts_created{drafter="eagle3",engine="0",model_name="m"} 1.7e9
vllm:spec_decode_num_draft_tokens_total{drafter="eagle3",engine="0",model_name="m"} 12.0
vllm:spec_decode_num_accepted_tokens_total{drafter="eagle3",engine="0",model_name="m"} 6.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{drafter="eagle3",engine="0",model_name="m",position="0"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{drafter="eagle3",engine="0",model_name="m",position="1"} 2.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{drafter="eagle3",engine="0",model_name="m",position="2"} 0.0
vllm:num_requests_running 3
"""


def test_each_drafter_has_its_own_counts() -> None:
    found = parse(PAGE)
    assert set(found) == {"ngram", "eagle3"}
    eagle = found["eagle3"]
    assert (eagle.num_drafts, eagle.num_draft_tokens, eagle.num_accepted_tokens) == (4, 12, 6)
    assert eagle.mean_acceptance_length == pytest.approx(2.5)
    assert eagle.acceptance_by_position == [1.0, 0.5]


def test_a_server_without_drafter_labels_has_one_nameless_drafter() -> None:
    found = parse('vllm:spec_decode_num_drafts_total{engine="0"} 2\nvllm:spec_decode_num_accepted_tokens 3')
    assert found == {"": DraftCounters(num_drafts=2, num_accepted_tokens=3)}


def test_what_happened_between_two_pages_is_their_difference() -> None:
    before = parse(PAGE)
    later = PAGE.replace("} 4.0", "} 9.0").replace("} 6.0", "} 8.0")
    change = total(parse(later)).since(total(before))
    assert (change.num_drafts, change.num_accepted_tokens, change.accepted_at[0]) == (5, 2, 5)


def test_no_drafts_have_no_mean() -> None:
    assert total(parse("up 1")).mean_acceptance_length is None
    assert total({}).acceptance_by_position == []
