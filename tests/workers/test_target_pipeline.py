"""On a GPU a step is made ready while the one before it runs, also after a step that came late."""

from __future__ import annotations

from collections import deque

import pytest

pytest.importorskip("mlx.core")

from shared.messages import Message, Step
from workers.target import Target

pytestmark = pytest.mark.mlx


def step(number: int) -> Step:
    return Step(epoch=1, step_id=number, starts=[], decodes=[], prefills=[])


class Link:
    """Hands over the script's messages one by one; None is a wait that was in vain."""

    def __init__(self, script: list[Message | None]) -> None:
        self.script = deque(script)
        self.target: Target | None = None
        self.num_dropped = 0

    def receive(self, patience_s: float, is_idle: bool) -> Message | None:
        assert self.target is not None
        if not self.script:
            self.target.is_draining = True
            return None
        return self.script.popleft()

    def close(self) -> None:
        pass


class Engine:
    def __init__(self) -> None:
        self.done: list[str] = []

    def begin(self, message: Step) -> int:
        self.done.append(f"begin {message.step_id}")
        return message.step_id

    def keep_blocks(self) -> None:
        pass


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, ["begin 1", "finish 1", "begin 2", "finish 2", "begin 3", "finish 3"]),
        (2, ["begin 1", "begin 2", "finish 1", "begin 3", "finish 2", "finish 3"]),
    ],
)
def test_a_step_that_comes_while_another_is_begun_is_queued_behind_it(depth: int, expected: list[str]) -> None:
    """The scheduler sent the second while the first was begun: once alone, steps must not stay alone for ever."""
    target = Target.__new__(Target)
    link, engine = Link([step(1), None, step(2), None, step(3), None, None, None]), Engine()
    link.target = target
    target.link, target.engine, target.depth = link, engine, depth  # type: ignore[assignment]
    target.archiver = target.sender = None
    target.is_draining, target.epoch, target.step_s, target.last_busy = False, 1, 0.0, 0.0
    target.last_step = target.last_release = target.last_load = 0
    target._finish = lambda running: engine.done.append(f"finish {running}")  # type: ignore[method-assign, assignment]
    target.run()
    assert engine.done == expected
