"""The part of a feature drafter that runs in the target process: captured hidden states to the rows that are sent.

Fusing first sends H numbers per token instead of taps x H. It is exact: `fc` and the norms around it come before
anything else in the drafter and see one position at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from workers.drafters.config import DrafterConfig
from workers.drafters.layers import Weights

Fusion = Callable[[Sequence[mx.array]], mx.array]
"""Captured arrays, one per tap in the order of `config.taps`, each (N, H) -> rows (N, H_drafter).

For a "final_hidden" feature there is one captured array: the rows after the target's final norm. For "hidden_and_kv"
that one comes first, then keys and values of each of `config.kv_layers`.
"""

FUSION_PREFIXES = ("fc.", "hidden_norm.", "input_norm.")
"""The tensors that the target process needs; the other ones are the drafter's."""


class TapFusion:
    """DFlash: hidden_norm(fc(taps)). EAGLE-3: fc(taps), with a norm of all of them before it where there is one."""

    def __init__(self, weights: Weights, config: DrafterConfig) -> None:
        self.num_taps = len(config.taps)
        self.fc = weights.linear("fc")
        self.input_norm = weights.optional_norm("input_norm")
        self.output_norm = weights.norm("hidden_norm") if config.kind == "dflash" else None

    def __call__(self, captured: Sequence[mx.array]) -> mx.array:
        if len(captured) != self.num_taps:
            raise ValueError(f"{len(captured)} captured taps, {self.num_taps} expected")
        rows = mx.concatenate(list(captured), axis=-1)
        rows = self.fc(rows if self.input_norm is None else self.input_norm(rows))
        return rows if self.output_norm is None else self.output_norm(rows)


def final_hidden(captured: Sequence[mx.array]) -> mx.array:
    """MTP: the rows after the target's final norm are sent as they are."""
    (rows,) = captured
    return rows


def joined(captured: Sequence[mx.array]) -> mx.array:
    """Gemma 4's assistant: the final hidden row, then keys and values of the captured layers, each (N, heads * dim)."""
    return mx.concatenate([rows.astype(captured[0].dtype) for rows in captured], axis=-1)
