"""Outputs tell which of their tokens were drafted, and by what: together exactly what the request's timings count."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import Output, Submit, Timings
from tests.scheduler.test_core import GREEDY
from tests.scheduler.test_speculation import HOW, DraftRig, K
from tests.support.fake_target import worker_info


def timings_of(outputs: list[Output]) -> Timings:
    assert outputs[-1].timings is not None, "the last output has the timings"
    return outputs[-1].timings


def counts(outputs: list[Output]) -> tuple[int, int, int]:
    """(drafts, drafted tokens, accepted tokens) that the outputs tell of."""
    told = [output.verified for output in outputs if output.verified is not None]
    return len(told), sum(v.num_draft_tokens for v in told), sum(v.num_accepted for v in told)


@given(answers=st.lists(HOW, min_size=1, max_size=12), ngram=st.booleans(), is_restarted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_outputs_tell_what_timings_count(answers: list[str], ngram: bool, is_restarted: bool) -> None:
    rig = DraftRig(worker_info(max_draft_tokens=K), ngram=ngram)
    rig.start_target()
    rig.start_drafter()
    for i in range(3):
        rig.submit(f"r{i}", [i, 1, 2], 20)
    for i, how in enumerate(answers):
        while rig.work():
            pass
        if not rig.answer(how):
            rig.wake()
        if is_restarted and i == 2:
            rig.start_target()
    rig.drain()
    for i in range(3):
        outputs = rig.outputs[f"r{i}"]
        timings = timings_of(outputs)
        assert counts(outputs) == (timings.num_drafts, timings.num_draft_tokens, timings.num_accepted_tokens)
        for output in outputs:
            if output.verified is not None:
                assert output.verified.num_accepted == len(output.token_ids) - 1, "no request ends inside a draft here"


def test_each_draft_carries_the_name_of_its_drafter() -> None:
    rig = DraftRig(ngram=False)
    rig.start_target()
    rig.start_drafter()
    rig.submit("r", [0, 1, 2], 20)
    rig.drain()
    outputs = rig.outputs["r"]
    assert {o.verified.drafter for o in outputs if o.verified is not None} == {"model"}
    assert timings_of(outputs).num_accepted_tokens > 10, "the drafter is right"
    assert outputs[0].verified is None, "the first token is the prefill's"


def test_an_output_that_ends_inside_a_draft_tells_of_all_that_was_accepted() -> None:
    rig = DraftRig(ngram=False)
    rig.start_target()
    rig.start_drafter()
    rig.submit("free", [0, 1, 2], 20)
    rig.drain()
    free = [o for o in rig.outputs["free"] if o.verified is not None and o.verified.num_accepted == K]
    stop = free[0].token_ids[0]
    rig.submit("stopped", [0, 1, 2], 20, stop_token_ids=[stop])
    rig.drain()
    outputs = rig.outputs["stopped"]
    assert outputs[-1].finish_reason == "stop"
    assert counts(outputs)[2] == timings_of(outputs).num_accepted_tokens


@pytest.mark.parametrize("how", ["right", "half"])
def test_tokens_that_are_sent_again_have_no_known_origin(how: str) -> None:
    rig = DraftRig(ngram=False)
    rig.start_target()
    rig.start_drafter()
    rig.submit("r", [0, 1, 2], 30)
    while not rig.outputs.get("r") or len(rig.outputs["r"]) < 3:
        assert rig.work() or rig.answer(how) or rig.wake()
    missed = [token for output in rig.outputs["r"] for token in output.token_ids]
    before = len(rig.outputs["r"])
    rig.send("front", Submit(request_id="r", prompt_token_ids=[0, 1, 2], sampling=GREEDY, max_tokens=30))  # type: ignore[arg-type]
    again = rig.outputs["r"][before]
    assert (again.token_ids[: len(missed)], again.is_repeated, again.verified) == (missed, True, None)
    rig.drain()
    assert not any(output.is_repeated for output in rig.outputs["r"][before + 1 :])
