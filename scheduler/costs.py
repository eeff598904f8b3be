"""How long a step takes, by batch size and width: seeded at start, followed online."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shared.messages import StepCost

SLOWER = 0.1  # weight of a measurement above the average: mostly a compilation, or another process's turn
FASTER = 0.4  # weight of one below it: nothing makes a step faster than it can be
DEFAULT_SLOPE = 0.08  # growth per extra token of width where nothing was measured


class StepCosts:
    """Batches are grouped by powers of two; widths between measured ones are interpolated.

    Args:
        is_by_token: steps cost by their tokens, however these are spread over rows: what was measured of few wide rows
            tells of many narrow ones.
    """

    def __init__(self, seed: Iterable[StepCost] = (), is_by_token: bool = False) -> None:
        self._is_by_token = is_by_token
        self._seconds: dict[tuple[int, int], float] = {}
        for cost in seed:
            self._seconds[batch_bucket(cost.batch), cost.width] = cost.seconds

    def add(self, batch: int, width: int, seconds: float) -> None:
        key = batch_bucket(batch), width
        old = self._seconds.get(key)
        self._seconds[key] = seconds if old is None else follow(old, seconds)

    def estimate(self, batch: int, width: float) -> float:
        """Seconds; 0.0 only while nothing at all was measured."""
        bucket = batch_bucket(batch)
        points = sorted((w, s) for (b, w), s in self._seconds.items() if b == bucket)
        if self._is_by_token and len(points) < 2 and (nearest := self._nearest(bucket, num_widths=2)) is not None:
            share = bucket / nearest  # so many rows of the nearest batch make one of this
            carried = self.estimate(nearest, width * share)
            if not points:
                return carried
            known_width, seconds = points[0]
            return carried * seconds / self.estimate(nearest, known_width * share)
        if not points:
            nearest = self._nearest(bucket, num_widths=1)
            return 0.0 if nearest is None else self.estimate(nearest, width)
        below = [p for p in points if p[0] <= width]
        above = [p for p in points if p[0] >= width]
        if below and above:
            (w0, s0), (w1, s1) = below[-1], above[0]
            return s0 if w0 == w1 else s0 + (s1 - s0) * (width - w0) / (w1 - w0)
        if below:
            w0, s0 = below[-1]
            first_width, first = points[0]
            slope = (s0 - first) / (w0 - first_width) if w0 > first_width else DEFAULT_SLOPE * s0
            return s0 + max(0.0, slope) * (width - w0)
        return points[0][1]

    def _nearest(self, bucket: int, num_widths: int) -> int | None:
        """The nearest other batch of which so many widths were measured; None: there is none."""
        known = Counter(b for b, _ in self._seconds if b != bucket)
        return min((b for b, n in known.items() if n >= num_widths), key=lambda b: abs(b - bucket), default=None)


def follow(average: float, measured: float) -> float:
    """The moving average of a duration, which outliers upwards move little.

    The first of its kind may compile kernels: what comes in far below it is the true cost.
    """
    if measured < average / 3:
        return measured
    measured = min(measured, 3 * average)
    return average + (SLOWER if measured > average else FASTER) * (measured - average)


def batch_bucket(batch: int) -> int:
    return 1 << max(0, batch - 1).bit_length()
