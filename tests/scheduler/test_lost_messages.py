"""Messages that are repeated, lost or swapped on their way never change a request's tokens."""

from __future__ import annotations

import re

import msgspec
import pytest

from scheduler.peers import LOST_AFTER_S
from scheduler.session import LOAD_TIMEOUT_S
from shared.messages import (
    ArchivedBlock,
    BlocksArchived,
    Heartbeat,
    Hello,
    LoadBlocks,
    Output,
    PrefixCacheInfo,
    Ready,
    Release,
    RequestId,
    Role,
    SamplingParams,
    SayHello,
    Step,
    Submit,
    Welcome,
)
from tests.scheduler.test_core import GREEDY, Rig
from tests.support.fake_target import FakeTarget, greedy, worker_info


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


def test_a_lost_load_begins_a_new_epoch() -> None:
    """A sequence waits for its blocks, and nobody can tell whether they will still be written: begin again."""
    info = PrefixCacheInfo(block_size=4, num_blocks=12, block_bytes=1)
    rig = Rig(worker_info(prefix_cache=info), heartbeat_timeout_s=10 * LOAD_TIMEOUT_S)
    rig.start_target()
    prompt = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2, 1]
    rig.submit("a", prompt, 2)
    rig.drain()
    archive = rig.target.archive
    rig.start_target()
    added = [ArchivedBlock(block_hash=h, has_window=b.has_window, has_state=False) for h, (b, _) in archive.items()]
    rig.send(rig.target_id, BlocksArchived(epoch=rig.epoch, added=added))
    rig.submit("b", prompt, 2)
    (lost,) = rig.queue
    assert isinstance(lost, LoadBlocks)
    rig.queue.clear()
    rig.now += LOAD_TIMEOUT_S + 1
    envelopes = rig.core.tick(rig.now)
    assert [r for r, m in envelopes if isinstance(m, SayHello)] == [rig.target_id]
    rig.start_target()
    rig.drain()
    assert rig.tokens("b") == greedy(prompt, 2)


def test_steps_and_releases_are_numbered_without_gaps() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    for i in range(6):
        rig.submit(f"r{i}", [0, 1, i % 3], 3)
    seen = (0, 0)
    while rig.queue:
        message = rig.queue[0]
        if isinstance(message, Step):
            assert (message.step_id, message.after_release) == (seen[0] + 1, seen[1])
            seen = (message.step_id, seen[1])
        elif isinstance(message, Release):
            assert (message.after_step, message.release_id) == (seen[0], seen[1] + 1)
            seen = (seen[0], message.release_id)
        rig.work()
    assert seen[0] > 3
    assert seen[1] > 1


def beat(rig: Rig, is_idle: bool = True) -> list[object]:
    """A heartbeat of the target after more than the time in which a message may be under way; what it is answered."""
    rig.now += LOST_AFTER_S + 0.1
    heartbeat = Heartbeat(instance_id=rig.target_id, epoch=rig.epoch, is_idle=is_idle)
    envelopes = rig.core.handle(rig.target_id, heartbeat, rig.now)
    rig.deliver(envelopes)
    return [message for receiver, message in envelopes if receiver == rig.target_id]


@pytest.mark.parametrize("lost", ["step", "result"])
def test_an_idle_target_with_a_step_lost_a_message(lost: str) -> None:
    """With one step in flight no later message shows the gap."""
    rig = Rig(worker_info())
    rig.start_target()
    rig.send("front", submit([1, 2], []))
    rig.work()
    while rig.queue:
        message = rig.queue.popleft()
        if lost == "result" and isinstance(message, Step):
            rig.target.run(message)
    assert not any(isinstance(m, SayHello) for m in beat(rig)), "the first one may have left before the step came"
    assert any(isinstance(m, SayHello) for m in beat(rig))
    assert not rig.core.hung, "nobody is killed"
    rig.send(rig.target_id, Hello(role="target", instance_id=rig.target_id, pid=2, last_exit=0))
    rig.target = FakeTarget(rig.info)
    rig.send(rig.target_id, Ready(epoch=rig.epoch, info=rig.info))
    page = rig.core.metrics.page().decode()
    assert re.search(r'resynchronisations_total\{[^}]*role="target"[^}]*\} 1.0', page)
    assert re.search(r'worker_restarts_total\{[^}]*role="target"[^}]*\} 0.0', page), "it is the same process"
    rig.assert_idle()
    assert aligned(rig.outputs["a"]) == greedy([1, 2], 20)
    assert rig.finish_reasons("a") == ["length"]


def test_a_target_at_work_is_left_alone() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    rig.send("front", submit([1, 2], []))
    for _ in range(5):
        assert not any(isinstance(m, SayHello) for m in beat(rig, is_idle=False))
    rig.assert_idle()
    for _ in range(5):
        assert not any(isinstance(m, SayHello) for m in beat(rig)), "idle, and nothing to do"


@pytest.mark.parametrize("lost", ["welcome", "ready"])
def test_a_lost_greeting_is_noticed(lost: str) -> None:
    rig = Rig(worker_info())
    rig.start_target()
    before = rig.epoch
    rig.send(rig.target_id, Hello(role="target", instance_id=rig.target_id, pid=2, last_exit=0))
    assert rig.epoch > before and rig.core.session is None
    if lost == "welcome":
        rig.epoch = before
    beat(rig)
    assert any(isinstance(m, SayHello) for m in beat(rig))


def test_a_drafter_whose_ready_was_lost_says_hello_again() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    answers = rig.core.handle("drafter", Hello(role="drafter", instance_id="drafter", pid=4), rig.now)
    epoch = next(m.epoch for _, m in answers if isinstance(m, Welcome))
    for is_noticed in (False, True):
        rig.now += LOST_AFTER_S + 0.1
        heartbeat = Heartbeat(instance_id="drafter", epoch=epoch, is_idle=True)
        envelopes = rig.core.handle("drafter", heartbeat, rig.now)
        assert (("drafter", SayHello()) in envelopes) == is_noticed


@pytest.mark.parametrize("longest", [-1, 1 << 62])
@pytest.mark.parametrize("role", ["target", "drafter"])
def test_a_worker_that_drafts_implausibly_is_not_taken(role: Role, longest: int) -> None:
    rig = Rig(worker_info())
    answers = rig.core.handle("wild", Hello(role=role, instance_id="wild", pid=4), rig.now)
    epoch = next(m.epoch for _, m in answers if isinstance(m, Welcome))
    info = msgspec.structs.replace(rig.info, draft_kind="eagle3", max_draft_tokens=longest)
    rig.core.handle("wild", Ready(epoch=epoch, info=info), rig.now)
    assert rig.core.session is None and not rig.core.speculator.is_neural


def test_a_frontend_is_never_taken_for_a_worker_that_lost_a_message() -> None:
    rig = Rig(worker_info())
    rig.start_target()
    for _ in range(3):
        rig.now += LOST_AFTER_S + 0.1
        envelopes = rig.core.handle("front", Heartbeat(instance_id="front", epoch=9, is_idle=True), rig.now)
        assert ("front", SayHello()) not in envelopes
    rig.send("front", submit([1, 2], []))
    rig.assert_idle()
    assert rig.finish_reasons("a") == ["length"]
