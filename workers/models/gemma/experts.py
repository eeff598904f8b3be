"""Gemma 4's mixture of experts, which stands beside a layer's dense MLP."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from workers.models.gemma.config import ExpertShape


class Router(nn.Module):
    """Chooses each token's experts and their weights."""

    def __init__(self, shape: ExpertShape, hidden: int, eps: float) -> None:
        super().__init__()
        self.num_chosen = shape.num_chosen
        self.eps = eps
        self.proj = nn.Linear(hidden, shape.num_experts, bias=False)
        self.scale = mx.ones((hidden,))
        self.per_expert_scale = mx.ones((shape.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Of x (B, L, H): indices and weights, (B, L, num_chosen) each.

        A softmax over the chosen scores equals a softmax over all of them that is then normalised.
        """
        scores = self.proj(mx.fast.rms_norm(x, self.scale * x.shape[-1] ** -0.5, self.eps)).astype(mx.float32)
        chosen = mx.argpartition(scores, kth=-self.num_chosen, axis=-1)[..., -self.num_chosen :]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return chosen, (weights * self.per_expert_scale[chosen]).astype(x.dtype)


class GatedGelu(nn.Module):
    def __call__(self, up: mx.array, gate: mx.array) -> mx.array:
        return nn.gelu_approx(gate) * up


class Experts(nn.Module):
    def __init__(self, shape: ExpertShape, hidden: int) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(hidden, shape.intermediate_size, shape.num_experts, GatedGelu(), bias=False)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        return (self.switch_glu(x, chosen) * weights[..., None]).sum(axis=-2)
