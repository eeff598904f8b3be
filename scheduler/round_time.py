"""How long a round takes, from one result to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

WINDOW = 48  # rounds that a time is the mean of
MAX_OVER_MEDIAN = 1.4
STRETCH = 3  # rounds
NUM_KNOWN = 8  # rounds that a time from before the start counts for
FASTER = 0.85  # than those before, a stretch tells that these were disturbed


class RoundTime:
    """Mean of the last rounds; one that took much longer was somebody else's turn, or a compilation, and is cut.

    A stretch is rounds with nothing else between them. Nothing makes rounds faster than they can be, so one that is
    clearly faster than those before makes them forgotten: they were measured while the server warmed up, or beside
    others.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._num_old = 0  # rounds of earlier stretches at the head of `_last`
        self.num = self.num_new = 0  # rounds in all; measured since the start
        self.value = 0.0

    @classmethod
    def known(cls, seconds: float, num: int) -> RoundTime:
        """As `num` rounds were some time ago: not many of now outweigh them, fewer where these are faster."""
        times = cls()
        times.num, times.value = min(num, NUM_KNOWN), seconds
        times._last.extend([seconds] * times.num)
        return times

    def begin_stretch(self) -> None:
        self._num_old = len(self._last)

    def add(self, seconds: float) -> None:
        self.num += 1
        self.num_new += 1
        self._num_old = min(self._num_old, WINDOW - 1)  # the oldest makes room
        self._last.append(seconds)
        rounds = list(self._last)
        self.value = capped_mean(rounds, MAX_OVER_MEDIAN)
        old, new = rounds[: self._num_old], rounds[self._num_old :]
        if old and len(new) == STRETCH:
            newest = capped_mean(new, MAX_OVER_MEDIAN)
            if newest < FASTER * capped_mean(old, MAX_OVER_MEDIAN):
                self._last, self._num_old, self.value = deque(new, maxlen=WINDOW), 0, newest


def capped_mean(values: Sequence[float], most: float) -> float:
    """The mean of `values`, of which none counts as more than `most` times their median."""
    cap = most * sorted(values)[(len(values) - 1) // 2]
    return sum(min(value, cap) for value in values) / len(values)
