"""What every trained drafter shares: its parameters by checkpoint name, projections, the feed-forward part, a batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import mlx.core as mx

from bench.training.attention import rotate
from bench.training.target import Shape, Target

Params = dict[str, mx.array]
"""Checkpoint name (without prefix) -> float32 master weights."""


@dataclass(frozen=True)
class Batch:
    """Rows of one training step. B documents of L tokens (right-padded), A anchors each, k predictions an anchor.

    Args:
        tokens: (B, L) int32.
        anchors: (B, A) int32, positions of the last committed token; at least 1.
        num_valid: (B, A) int32, how many of the k predictions lie inside the document; 0 for a padding anchor.
    """

    tokens: mx.array
    anchors: mx.array
    num_valid: mx.array


@dataclass(frozen=True)
class Features:
    """What the target gives for a batch: `taps` (B, L, n * H), scaled per channel; `final` (B, L, H)."""

    taps: mx.array | None
    final: mx.array


@dataclass
class Trained(ABC):
    """A drafter under training: parameters are held by the caller, this knows the arithmetic.

    `tap_scale` (n * H,): what each tap's channel is divided by, folded into `fc` on export.
    """

    shape: Shape
    embedding: mx.array  # (V, H), the target's, frozen
    taps: tuple[int, ...] = ()
    tap_scale: mx.array | None = field(default=None)

    kind = ""

    @property
    @abstractmethod
    def num_predictions(self) -> int:
        """k: rows that predict, of one anchor."""

    @abstractmethod
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (rows, columns) of every projection."""

    @abstractmethod
    def norms(self) -> dict[str, int]:
        """Name -> size of every norm."""

    @abstractmethod
    def forward(self, params: Params, batch: Batch, features: Features, dtype: mx.Dtype) -> mx.array:
        """(B, A, k, H): rows for the target's head. Row j predicts the token at anchor + 1 + j."""

    @abstractmethod
    def warm_start(self, params: Params, target: Target) -> Params:
        """Parameters that begin as parts of the target's last blocks, the rest as they are."""

    def features(self, target: Target, tokens: mx.array) -> Features:
        taps, final = target.forward(tokens)
        if not self.taps:
            return Features(None, final)
        rows = mx.concatenate([taps[t] for t in self.taps], axis=-1)
        if self.tap_scale is not None:
            rows = (rows / self.tap_scale).astype(rows.dtype)
        return Features(rows, final)

    def initialise(self, seed: int, target: Target, *, norm_scale: float) -> Params:
        """Random projections, the two that write to the residual small; norms 1, the last one as the target's, smaller.

        The target's norm makes logits of its own scale, which random rows turn into a loss of over 100 at first.
        """
        key = mx.random.key(seed)
        params: Params = {}
        for name, (rows, columns) in self.matrices().items():
            key, draw = mx.random.split(key)
            scale = columns**-0.5 * (0.1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            params[name] = mx.random.normal((rows, columns), key=draw) * scale
        for name, size in self.norms().items():
            params[name] = mx.ones((size,))
        params["norm.weight"] = target.final_norm.astype(mx.float32) * norm_scale
        return params


def layer_matrices(shape: Shape, prefix: str, inputs: int) -> dict[str, tuple[int, int]]:
    h, d = shape.hidden_size, shape.head_dim
    return {
        prefix + "self_attn.q_proj.weight": (shape.num_heads * d, inputs),
        prefix + "self_attn.k_proj.weight": (shape.num_kv_heads * d, inputs),
        prefix + "self_attn.v_proj.weight": (shape.num_kv_heads * d, inputs),
        prefix + "self_attn.o_proj.weight": (h, shape.num_heads * d),
        prefix + "mlp.gate_proj.weight": (shape.inner_size, h),
        prefix + "mlp.up_proj.weight": (shape.inner_size, h),
        prefix + "mlp.down_proj.weight": (h, shape.inner_size),
    }


class LayerMath:
    """One transformer layer's parts on given parameters, cast to the compute type."""

    def __init__(self, params: Params, prefix: str, shape: Shape, dtype: mx.Dtype) -> None:
        self._params = params
        self._prefix = prefix
        self._shape = shape
        self._dtype = dtype

    def weight(self, name: str) -> mx.array:
        return self._params[self._prefix + name].astype(self._dtype)

    def norm(self, x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, self.weight(name + ".weight"), self._shape.rms_norm_eps)

    def heads(self, x: mx.array, name: str, offsets: mx.array | int | None) -> mx.array:
        """x (N, rows, inputs) -> (N, heads, rows, D), normed per head where the checkpoint is, rotated with offsets."""
        projected = x @ self.weight(f"self_attn.{name}_proj.weight").T
        split = projected.reshape(*x.shape[:2], -1, self._shape.head_dim)
        if f"{self._prefix}self_attn.{name}_norm.weight" in self._params:
            split = self.norm(split, f"self_attn.{name}_norm")
        split = split.transpose(0, 2, 1, 3)
        return split if offsets is None else rotate(split, offsets, self._shape.rope_theta)

    def output(self, x: mx.array) -> mx.array:
        return x @ self.weight("self_attn.o_proj.weight").T

    def mlp(self, x: mx.array) -> mx.array:
        gate, up = x @ self.weight("mlp.gate_proj.weight").T, x @ self.weight("mlp.up_proj.weight").T
        return (gate * mx.sigmoid(gate) * up) @ self.weight("mlp.down_proj.weight").T


def rows_at(x: mx.array, positions: mx.array) -> mx.array:
    """x (B, L, n) at positions (B, A) -> (B, A, n)."""
    return mx.take_along_axis(x, positions[..., None], axis=1)
