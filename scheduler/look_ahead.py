"""How many steps the target is given before the first of them has its result."""

from __future__ import annotations

from collections.abc import Mapping

STEPS = 2  # one runs, one is queued behind it
STEPS_HOST_BOUND = 3
DEVICE_SHARE = (
    0.1  # of the time to make a step ready and wait for it; with less of it for waiting, the host is the limit
)
WEIGHT = 0.1  # of a step


class LookAhead:
    """Where the device is the limit, planning hides behind it. Where the host is, which makes one step ready after the
    other, it would wait for the scheduler between two of them: there a third one lies ready at the target. It costs a
    new request one more step until its first token, and a row that ended one more row.

    Args:
        queues_steps: of the target, a GPU's.
    """

    def __init__(self, queues_steps: bool) -> None:
        self._queues_steps = queues_steps
        self._device_share = 1.0

    @property
    def num_steps(self) -> int:
        return STEPS_HOST_BOUND if self._device_share < DEVICE_SHARE else STEPS

    def finished(self, phases: Mapping[str, float], is_alone: bool) -> None:
        """A step gave its result. One that was alone hid nothing, and tells nothing."""
        total = phases.get("build", 0.0) + phases.get("device", 0.0)
        if not self._queues_steps or is_alone or total <= 0.0:
            return
        self._device_share += WEIGHT * (phases.get("device", 0.0) / total - self._device_share)
