"""Drafts from outside: what is wrong with them is counted, and plain decoding goes on."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.drafts import first, problem
from shared.messages import Draft, DraftDistribution, DraftReply, RequestId, SamplingParams
from tests.scheduler.test_speculation import DraftRig
from tests.support.fake_target import VOCAB, greedy, worker_info

SAMPLED = SamplingParams(temperature=1.0, seed=3)


def distribution(ids: object, q: object) -> DraftDistribution:
    a, b = np.array(ids, "<i4"), np.array(q, "<f4")
    return DraftDistribution(width=a.shape[1], token_ids=a.tobytes(), probabilities=b.tobytes())


def draft(tokens: list[int], q: DraftDistribution | None) -> Draft:
    return Draft(request_id=RequestId("a"), anchor=1, token_ids=tokens, distribution=q)


RIGHT = distribution([[0, 2], [1, 0]], [[0.25, 0.75], [1.0, 0.0]])


def test_a_right_draft_has_no_problem_and_its_head_is_one_too() -> None:
    assert problem(draft([2, 1], RIGHT), VOCAB) is None
    assert problem(draft([2, 1], None), VOCAB) is None
    assert problem(draft([2], first(RIGHT, 1)), VOCAB) is None


@pytest.mark.parametrize(
    ("tokens", "q", "reason"),
    [
        ([VOCAB], None, "bad_token"),
        ([-1, 0], None, "bad_token"),
        ([2, 1], first(RIGHT, 1), "bad_distribution"),  # a row is missing
        ([2], RIGHT, "bad_distribution"),  # a row too many
        ([1, 1], RIGHT, "bad_distribution"),  # a draft without a chance
        ([2, 0], RIGHT, "bad_distribution"),
        ([0], distribution([[0, VOCAB]], [[0.5, 0.5]]), "bad_distribution"),
        ([0], distribution([[0, -1]], [[1.0, 0.0]]), "bad_distribution"),
        ([0], distribution([[0, 1]], [[0.5, 0.4]]), "bad_distribution"),
        ([0], distribution([[0, 1]], [[1.5, -0.5]]), "bad_distribution"),
        ([0], distribution([[0, 1]], [[float("nan"), 1.0]]), "bad_distribution"),
        ([0], DraftDistribution(width=0, token_ids=b"", probabilities=b""), "bad_distribution"),
        ([0], DraftDistribution(width=-1, token_ids=b"", probabilities=b""), "bad_distribution"),
        ([0], DraftDistribution(width=1, token_ids=b"abc", probabilities=b"\0\0\x80?"), "bad_distribution"),
    ],
)
def test_what_is_wrong_with_a_draft(tokens: list[int], q: DraftDistribution | None, reason: str) -> None:
    assert problem(draft(tokens, q), VOCAB) == reason


def started() -> DraftRig:
    rig = DraftRig(worker_info(max_draft_tokens=4))
    rig.start_target()
    rig.start_drafter()
    return rig


def answer(rig: DraftRig, tokens: list[int], q: DraftDistribution | None) -> None:
    request = rig.asked.popleft()
    (row,) = request.rows
    rig.right(row)  # the drafter has the text from here on
    made = Draft(request_id=row.request_id, anchor=row.start + len(row.token_ids) - 1, token_ids=tokens, distribution=q)
    rig.send(
        rig.drafter_id, DraftReply(epoch=rig.drafter_epoch, draft_id=request.draft_id, drafts=[made], seconds=0.001)
    )


@pytest.mark.parametrize(
    ("tokens", "q", "reason"),
    [([VOCAB + 5], None, "bad_token"), ([1], distribution([[0, 2]], [[0.5, 0.5]]), "bad_distribution")],
)
def test_a_malformed_draft_is_counted_and_decoding_goes_on(
    tokens: list[int], q: DraftDistribution | None, reason: str
) -> None:
    rig = started()
    rig.submit("a", [1, 2], 12, sampling=SAMPLED)
    rig.work()
    answer(rig, tokens, q)
    assert rig.queue[-1].decodes[0].num_drafts == 0  # type: ignore[union-attr] # a Step
    page = rig.core.metrics.page().decode()
    assert any(f'reason="{reason}"' in line and line.endswith(" 1.0") for line in page.splitlines())
    rig.drain("empty")
    assert rig.tokens("a") == greedy([1, 2], 12)


def test_a_distribution_reaches_the_target_cut_to_the_drafts_that_fit() -> None:
    rig = started()
    rig.submit("a", [1, 2], 3, sampling=SAMPLED)
    rig.work()
    assert rig.asked[0].rows[0].sampling == SAMPLED
    answer(rig, [2, 1], RIGHT)
    row = rig.queue[-1].decodes[0]  # type: ignore[union-attr] # a Step
    assert row.num_drafts == 1
    assert row.draft_distribution == first(RIGHT, 1)


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SamplingParams(seed=3, is_seeded=True)])
def test_greedy_and_seeded_requests_are_drafted_for_greedily(sampling: SamplingParams) -> None:
    rig = started()
    rig.submit("a", [1, 2], 12, sampling=sampling)
    rig.work()
    assert rig.asked[0].rows[0].sampling is None
