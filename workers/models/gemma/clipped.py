"""A linear layer whose inputs and outputs are clamped to ranges that are stored with its weights."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


class ClippedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, is_clipped: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        self.is_clipped = is_clipped
        if is_clipped:
            self.input_min, self.output_min = mx.array(-mx.inf), mx.array(-mx.inf)
            self.input_max, self.output_max = mx.array(mx.inf), mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        if not self.is_clipped:
            return self.linear(x)
        return mx.clip(self.linear(mx.clip(x, self.input_min, self.input_max)), self.output_min, self.output_max)


class MediaEmbedder(nn.Module):
    """From a tower's width to the text decoder's: a norm without weights and a projection."""

    def __init__(self, inputs: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.embedding_projection = nn.Linear(inputs, hidden, bias=False)
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(x, None, self.eps))
