"""How long a step takes, by batch size and width: seeded at start, followed online."""

from __future__ import annotations

from collections.abc import Iterable

from shared.messages import StepCost

WEIGHT = 0.15  # of a new measurement in the moving average
DEFAULT_SLOPE = 0.08  # growth per extra token of width where nothing was measured


class StepCosts:
    """Batches are grouped by powers of two; widths between measured ones are interpolated."""

    def __init__(self, seed: Iterable[StepCost] = ()) -> None:
        self._seconds: dict[tuple[int, int], float] = {}
        for cost in seed:
            self._seconds[_bucket(cost.batch), cost.width] = cost.seconds

    def add(self, batch: int, width: int, seconds: float) -> None:
        key = _bucket(batch), width
        old = self._seconds.get(key)
        # A step far out of the ordinary (another process had the machine) moves the average little.
        self._seconds[key] = seconds if old is None else old + WEIGHT * (min(seconds, 3 * old) - old)

    def estimate(self, batch: int, width: int) -> float:
        """Seconds; 0.0 only while nothing at all was measured."""
        bucket = _bucket(batch)
        points = sorted((w, s) for (b, w), s in self._seconds.items() if b == bucket)
        if not points:
            nearest = min({b for b, _ in self._seconds}, key=lambda b: abs(b - bucket), default=None)
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


def _bucket(batch: int) -> int:
    return 1 << max(0, batch - 1).bit_length()
