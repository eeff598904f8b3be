"""One vector for a prompt out of its hidden rows, gathered over the forwards that compute it."""

from __future__ import annotations

import mlx.core as mx

from shared.messages import Pooling


class Pool:
    """Rows of one sequence on their way to its vector.

    Args:
        kind: "last" keeps the last position's row, "mean" the mean over all positions, summed in float32.
    """

    def __init__(self, kind: Pooling) -> None:
        self.kind = kind
        self._sum: mx.array | None = None
        self._num_rows = 0

    def add(self, rows: mx.array) -> None:
        """The next positions' rows (n, H) after the final norm. Lazy."""
        if self.kind == "last":
            self._sum, self._num_rows = rows[-1].astype(mx.float32), 1
            return
        part = rows.astype(mx.float32).sum(axis=0)
        self._sum = part if self._sum is None else self._sum + part
        self._num_rows += rows.shape[0]

    def pending(self) -> mx.array:
        """To be evaluated with the step, or a long prompt's graph would keep all its forwards alive."""
        assert self._sum is not None, "no rows yet"
        return self._sum

    def vector(self) -> mx.array:
        """(H,) float32, lazy."""
        return self.pending() / self._num_rows
