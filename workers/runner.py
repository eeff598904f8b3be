"""Calls a model for the engine: one forward, and the head for the rows that are sampled only.

Tandem's own models split `hidden` from `logits`; an mlx-lm architecture gives logits for every position, so there the
"hidden rows" are rows of logits and the head does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx


class ModelRunner:
    """Args:
    model: `model(inputs, cache=..., input_embeddings=...) -> logits`; with `hidden` and `logits` where it can.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - any architecture that mlx-lm defines
        self.model = model
        self._is_split = hasattr(model, "hidden") and hasattr(model, "logits")

    def hidden_rows(
        self, inputs: mx.array, cache: Sequence[object], wanted: Sequence[tuple[int, int, int]]
    ) -> mx.array:
        """One forward over inputs (B, L).

        Args:
            wanted: (batch row, first, end) spans of positions.
        Returns:
            (n, H): the wanted positions' rows, in order.
        """
        out = self.model.hidden(inputs, cache=cache) if self._is_split else self.model(inputs, cache=cache)
        if not wanted:
            return out.reshape(-1, out.shape[-1])[:0]
        spans = {(first, end) for _, first, end in wanted}
        if len(spans) == 1 and len(wanted) == inputs.shape[0]:
            first, end = next(iter(spans))
            return out[:, first:end].reshape(-1, out.shape[-1])
        flat = [row * inputs.shape[1] + i for row, first, end in wanted for i in range(first, end)]
        return out.reshape(-1, out.shape[-1])[mx.array(flat)]

    def head(self, rows: mx.array) -> mx.array:
        """Logits (n, V) of hidden rows (n, H)."""
        return self.model.logits(rows) if self._is_split else rows
