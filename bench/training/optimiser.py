"""Muon for matrices, AdamW for norms; float32 master weights.

Matrices of one shape are orthogonalised together: one batched product in place of dozens of small ones.
Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv:2502.16982, for the factor 0.2 sqrt(max(rows, columns)) that
gives an update AdamW's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

State = dict[str, mx.array]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: steepest at 0, so five rounds bring all values near 1
NUM_ROUNDS = 5


@dataclass(frozen=True)
class Optimiser:
    """`matrix_rate` and `norm_rate` are peaks; `step` multiplies both with the schedule's factor."""

    matrix_rate: float = 5e-3
    norm_rate: float = 1e-3
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = 1.0
    is_muon: bool = True
    weight_decay: float = 0.0

    def init(self, params: Mapping[str, mx.array]) -> State:
        state: State = {}
        for name, value in params.items():
            state[name + ".m"] = mx.zeros_like(value)
            if not self._is_orthogonalised(value):
                state[name + ".v"] = mx.zeros_like(value)
        return state

    def step(
        self, params: Mapping[str, mx.array], gradients: Mapping[str, mx.array], state: State, number: mx.array,
        factor: mx.array,
    ) -> tuple[dict[str, mx.array], State, mx.array]:  # fmt: skip
        """(new parameters, new state, gradient norm before clipping).

        Args:
            number: float32 scalar, 1 in the first step.
            factor: float32 scalar, 0..1, of the learning rates.
        """
        norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.array(0.0)))
        clip = mx.minimum(1.0, self.max_norm / (norm + 1e-6))
        new: dict[str, mx.array] = {}
        held: State = {}
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, value in params.items():
            if self._is_orthogonalised(value):
                by_shape.setdefault(value.shape, []).append(name)
            else:
                new[name] = self._adamw(name, value, gradients[name] * clip, state, held, number, factor)
        for shape, names in by_shape.items():
            gradient = mx.stack([gradients[n] for n in names]) * clip
            momentum = self.momentum * mx.stack([state[n + ".m"] for n in names]) + (1 - self.momentum) * gradient
            direction = orthogonal((1 - self.momentum) * gradient + self.momentum * momentum)
            rate = self.matrix_rate * factor
            size = rate * 0.2 * max(shape) ** 0.5
            for i, n in enumerate(names):
                held[n + ".m"] = momentum[i]
                new[n] = params[n] * (1 - rate * self.weight_decay) - size * direction[i]
        return {n: new[n] for n in params}, held, norm

    def _adamw(
        self, name: str, value: mx.array, gradient: mx.array, state: State, held: State, number: mx.array,
        factor: mx.array,
    ) -> mx.array:  # fmt: skip
        b1, b2 = self.betas
        m = held[name + ".m"] = b1 * state[name + ".m"] + (1 - b1) * gradient
        v = held[name + ".v"] = b2 * state[name + ".v"] + (1 - b2) * mx.square(gradient)
        unbiased = mx.sqrt(v / (1 - mx.power(b2, number))) + 1e-8
        return value - self.norm_rate * factor * (m / (1 - mx.power(b1, number))) / unbiased

    def _is_orthogonalised(self, value: mx.array) -> bool:
        return self.is_muon and value.ndim == 2


def orthogonal(x: mx.array) -> mx.array:
    """The nearest semi-orthogonal matrices to x (N, rows, columns), roughly: singular values of 0.7 to 1.2. Float32.

    The rounds are in bfloat16 on a GPU; on a CPU only float32 is fast.
    """
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16
    is_tall = x.shape[1] > x.shape[2]
    x = x.astype(mx.float32)
    x = x / (mx.sqrt(mx.square(x).sum(axis=(1, 2), keepdims=True)) + 1e-7)
    x = (x.swapaxes(1, 2) if is_tall else x).astype(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ROUNDS):
        gram = x @ x.swapaxes(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.swapaxes(1, 2) if is_tall else x).astype(mx.float32)


def cosine(progress: float, warm_up: float = 0.04, end: float = 0.0) -> float:
    """The learning rates' factor at `progress` 0..1: up linearly, then half a cosine down to `end`."""
    if progress < warm_up:
        return max(progress / warm_up, 0.01)
    share = min(1.0, (progress - warm_up) / (1 - warm_up))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * share))
