"""Messages that are repeated, lost or swapped on their way never change a request's tokens."""

from __future__ import annotations

import msgspec
import pytest

from shared.messages import Hello, Output, Ready, RequestId, SamplingParams, SayHello, Step, Submit
from tests.scheduler.test_core import GREEDY, Rig
from tests.support.fake_target import greedy, worker_info


def submit(prompt: list[int], tokens: list[int], sampling: SamplingParams = GREEDY) -> Submit:
    return Submit(
        request_id=RequestId("a"), prompt_token_ids=prompt, sampling=sampling, max_tokens=20, output_token_ids=tokens
    )


def aligned(outputs: list[Output]) -> list[int]:
    """The tokens as a frontend reads them: by their places, repetitions dropped."""
    tokens: list[int] = []
    for output in outputs:
        assert output.start is not None and output.start <= len(tokens), "a gap"
        tokens[output.start :] = [*output.token_ids, *tokens[output.start + len(output.token_ids) :]]
    return tokens


@pytest.mark.parametrize("num_logprobs", [None, 0])
def test_a_submit_again_brings_the_tokens_that_were_missed(num_logprobs: int | None) -> None:
    rig = Rig(worker_info())
    rig.start_target()
    sampling = msgspec.structs.replace(GREEDY, num_logprobs=num_logprobs)
    rig.send("front", submit([1, 2], [], sampling))
    for _ in range(6):
        rig.work()
    seen = rig.tokens("a")[:2]
    del rig.outputs["a"]  # the frontend missed all after these
    rig.send("front", submit([1, 2], seen, sampling))
    rig.assert_idle()
    assert not rig.rejected
    assert rig.outputs["a"][0].start == 2
    assert seen + aligned([msgspec.structs.replace(o, start=(o.start or 0) - 2) for o in rig.outputs["a"]]) == greedy(
        [1, 2], 20
    )
    assert rig.finish_reasons("a") == ["length"]


def test_a_submit_twice_is_one_request() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    for _ in range(3):
        rig.send("front", submit([1, 2], []))
        rig.work()
        rig.work()
    rig.assert_idle()
    assert aligned(rig.outputs["a"]) == greedy([1, 2], 20)
    assert rig.finish_reasons("a") == ["length"]


def test_another_frontends_request_of_the_same_name_is_refused() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.send("other", Hello(role="frontend", instance_id="other", pid=3))
    rig.send("front", submit([1, 2], []))
    rig.send("other", submit([1, 2], []))
    assert rig.rejected["a"].code == "invalid_request_error"
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1, 2], 20)


def test_ready_twice_is_ready_once() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1, 2], 20)
    for _ in range(3):
        rig.work()
    rig.send(rig.target_id, Ready(epoch=rig.epoch, info=rig.info))
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1, 2], 20)


@pytest.mark.parametrize("swapped", [True, False])
def test_a_result_that_is_lost_or_late_begins_a_new_epoch(swapped: bool) -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.submit("a", [1, 2], 20)
    for _ in range(3):
        rig.work()
    steps = [m for m in rig.queue if isinstance(m, Step)]
    assert len(steps) == 2, "decode is pipelined"
    first, second = (rig.target.run(step) for step in steps)
    before = rig.core.peers.by_role("target")
    rig.now += 0.001
    envelopes = rig.core.handle(rig.target_id, second, rig.now)
    assert [m for r, m in envelopes if r == rig.target_id] == [SayHello()]
    assert before is not None and rig.core.peers.by_role("target") is None
    if swapped:
        rig.deliver(rig.core.handle(rig.target_id, first, rig.now))
    rig.start_target()
    assert not rig.core.suspects
    rig.assert_idle()
    assert rig.tokens("a") == greedy([1, 2], 20)


def test_steps_are_numbered_from_one_in_each_epoch_and_releases_say_after_which() -> None:
    rig = Rig(worker_info())
    for _ in range(2):
        rig.start_target()
        rig.submit(f"r{rig.num_targets}", [1, 2], 3)
        seen = []
        while rig.queue:
            message = rig.queue[0]
            seen.append(message.step_id if isinstance(message, Step) else message.after_step)
            rig.work()
        assert seen[0] == 1 and seen == sorted(seen) and len(seen) > 3
