"""On a GPU a step is made ready while the one before it runs, also after a step that came late."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import pytest

pytest.importorskip("mlx.core")

from shared.messages import Message, Step
from workers.target import Target

pytestmark = pytest.mark.mlx


def step(number: int) -> Step:
    return Step(epoch=1, step_id=number, starts=[], decodes=[], prefills=[])


BUILD_S = 0.005  # that a step takes to be made ready


@dataclass
class After:
    """A message that comes some time after the result before it."""

    seconds: float
    message: Message


class Link:
    """Hands over the script's messages one by one; None is a wait that was in vain."""

    def __init__(self, script: list[Message | After | None]) -> None:
        self.script = deque(script)
        self.target: Target | None = None
        self.num_dropped = 0

    def receive(self, patience_s: float, is_idle: bool) -> Message | None:
        assert self.target is not None
        if not self.script:
            self.target.is_draining = True
            return None
        following = self.script.popleft()
        if isinstance(following, After):
            if patience_s < following.seconds:
                self.script.appendleft(following.message)
                return None
            return following.message
        return following

    def close(self) -> None:
        pass


@dataclass
class Pending:
    number: int
    build_s: float = BUILD_S


class Engine:
    def __init__(self) -> None:
        self.done: list[str] = []

    def begin(self, message: Step) -> Pending:
        self.done.append(f"begin {message.step_id}")
        return Pending(message.step_id)

    def keep_blocks(self) -> None:
        pass


def run(depth: int, script: list[Message | After | None]) -> list[str]:
    """What the target does with the script's messages."""
    target = Target.__new__(Target)
    link, engine = Link([*script, None, None, None]), Engine()
    link.target = target
    target.link, target.engine, target.depth = link, engine, depth  # type: ignore[assignment]
    target.archiver = target.sender = None
    target.is_draining, target.epoch, target.step_s, target.last_busy = False, 1, 0.0, 0.0
    target.build_s, target.is_queued = 0.0, False
    target.last_step = target.last_release = target.last_load = 0
    target._finish = lambda step: engine.done.append(f"finish {step.number}")  # type: ignore[method-assign, assignment, attr-defined]
    target.run()
    return engine.done


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, ["begin 1", "finish 1", "begin 2", "finish 2", "begin 3", "finish 3"]),
        (2, ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3"]),
    ],
)
def test_a_step_that_comes_while_another_is_begun_is_queued_behind_it(depth: int, expected: list[str]) -> None:
    """The scheduler sent the second while the first was begun: once alone, steps must not stay alone for ever."""
    assert run(depth, [step(1), None, step(2), None, step(3)]) == expected


def test_behind_a_queued_step_the_next_one_is_waited_for_as_long_as_one_takes_to_be_made_ready() -> None:
    """Where the host is the limit a result is there at once, and time to wait for tells nothing of a step's time."""
    plan_s = BUILD_S / 10
    done = run(2, [step(1), step(2), None, After(plan_s, step(3)), After(plan_s, step(4))])
    assert done == ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "begin 4", "finish 3", "finish 4"]


def test_a_step_that_came_alone_is_not_held_up() -> None:
    """With drafts the next step needs its result."""
    done = run(2, [step(1), None, After(BUILD_S / 10, step(2)), None, After(BUILD_S / 10, step(3))])
    assert done == ["begin 1", "finish 1", "begin 2", "finish 2", "begin 3", "finish 3"]
