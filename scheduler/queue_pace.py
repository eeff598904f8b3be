"""How fast the queue moves: the time between two requests' ends while others wait."""

from __future__ import annotations

NEWEST_WEIGHT = 0.1


class QueuePace:
    def __init__(self) -> None:
        self.interval_s = 0.0  # moving average; 0 while nobody has waited
        self._last_end: float | None = None

    def ended(self, now: float, num_waiting: int) -> None:
        """A request has ended, and so many wait."""
        if self._last_end is not None:
            gap = now - self._last_end
            self.interval_s += NEWEST_WEIGHT * (gap - self.interval_s) if self.interval_s else gap
        self._last_end = now if num_waiting else None  # a gap in which nobody waits says nothing
