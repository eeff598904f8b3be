"""Layers of Qwen3.5 and Qwen3-Next: mlx-lm's modules with forwards of ours.

Attention ends in `cache.attend`, so that our kernels serve it. The gated delta net leaves a trail of a step that
verifies drafts (`workers/cache/recurrent.py`), and on a GPU, where each launch counts, its projections are one product
and its convolution of four tokens is elementwise. Parameters stay where mlx-lm has them until then.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.gated_delta import gated_delta_update, normalize_qk

from workers.cache.recurrent import RecurrentView, State
from workers.models import fuse
from workers.models.decoder import joined_swiglu
from workers.models.rope import Rope, plain_rope

L2_EPS = 1e-6


class Attention(qwen3_next.Qwen3NextAttention):
    """Gated attention, of which the head's first dimensions turn."""

    own_rope: Rope | None = None  # where a kernel may rotate

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # noqa: ANN401 - mlx-lm's
        if not hasattr(cache, "attend"):
            return super().__call__(x, mask, cache)
        batch, length, _ = x.shape
        q, k, v = self._projected(x)
        q, gate = mx.split(q.reshape(batch, length, self.num_attention_heads, -1), 2, axis=-1)
        q = self.q_norm(q).swapaxes(1, 2)
        k = self.k_norm(k.reshape(batch, length, self.num_key_value_heads, -1)).swapaxes(1, 2)
        v = v.reshape(batch, length, self.num_key_value_heads, -1).swapaxes(1, 2)
        rotation = None
        if self.own_rope is not None and not getattr(self.rope, "is_placed", False):
            rotation = self.own_rope.at(cache.offset, length, batch, is_cpu=False)
        else:
            q, k = self.rope(q, offset=cache.offset), self.rope(k, offset=cache.offset)
        out = cache.attend(q, k, v, self.scale, rotation=rotation).swapaxes(1, 2).reshape(batch, length, -1)
        return self.o_proj(out * mx.sigmoid(gate.reshape(batch, length, -1)))

    def _projected(self, x: mx.array) -> list[mx.array]:
        if "qkv_proj" not in self:
            return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        size = self.num_key_value_heads * self.head_dim
        return list(mx.split(self.qkv_proj(x), [2 * self.num_attention_heads * self.head_dim, -size], axis=-1))

    def join(self) -> None:
        fuse.join(self, ["q_proj", "k_proj", "v_proj"], "qkv_proj")


class DeltaTrail:
    """`Trail` of a gated delta net. `conv_input` (B, K - 1 + L, C) begins with the rows before the step."""

    def __init__(self, layer: nn.Module, inputs: list[mx.array], state: mx.array | None, lengths: list[int]) -> None:
        self.lengths = lengths
        self._layer, self._state = layer, state
        self._conv_input, *self._changes = inputs

    def rewound(self, counts: tuple[int, ...]) -> State:
        k, v, a, b = self._changes
        layer = self._layer
        mask = _is_kept(counts, k.shape[1])
        _, state = gated_delta_update(k, k, v, a, b, layer.A_log, layer.dt_bias, self._state, mask)
        return [_rows_at(self._conv_input, counts, layer.conv_kernel_size - 1), state]


@lru_cache(maxsize=4)  # all layers of a step ask for the same, and on a GPU each operation is a launch
def _is_kept(counts: tuple[int, ...], length: int) -> mx.array:
    """(B, length) bool: the first counts[i] tokens of row i."""
    return mx.array(np.arange(length) < np.array(counts)[:, None])


@lru_cache(maxsize=4)
def _before(counts: tuple[int, ...], size: int) -> mx.array:
    """(B, size, 1) int32: counts[i] + 0 .. size - 1."""
    return mx.array((np.array(counts)[:, None] + np.arange(size))[..., None].astype(np.int32))


def _rows_at(conv_input: mx.array, counts: tuple[int, ...], size: int) -> mx.array:
    """The `size` rows of a convolution's input that stand before its token number counts[i]."""
    return mx.take_along_axis(conv_input, _before(counts, size), axis=1)


@mx.compile
def short_convolution(x: mx.array, taps: mx.array) -> mx.array:
    """silu of a causal convolution of each channel: x (B, K - 1 + L, C), taps (K, C) float32 -> (B, L, C)."""
    size = taps.shape[0]
    length = x.shape[1] - size + 1
    total = x[:, :length].astype(mx.float32) * taps[0]
    for i in range(1, size):
        total = total + x[:, i : i + length].astype(mx.float32) * taps[i]
    return (total * mx.sigmoid(total)).astype(x.dtype)


def _real(cache: Any, length: int) -> tuple[int, ...]:  # noqa: ANN401 - ours, or mlx-lm's in a comparison
    """How many tokens of each row are no padding."""
    known = cache.host_lengths if isinstance(cache, RecurrentView) else cache.lengths.tolist()
    return tuple(min(max(n, 0), length) for n in known)


class _DeltaNet:
    """What both gated delta nets have in common, behind their projections."""

    def _scanned(
        self: Any,
        qkv: mx.array, z: mx.array, b: mx.array, a: mx.array, mask: mx.array | None, cache: Any,  # noqa: ANN401
    ) -> mx.array:  # fmt: skip
        batch, length, _ = qkv.shape
        size = self.conv_kernel_size - 1
        before = cache[0] if cache is not None else None
        if before is None:
            before = mx.zeros((batch, size, self.conv_dim), dtype=qkv.dtype)
        if mask is not None:
            qkv = mx.where(mask[..., None], qkv, 0)
        conv_input = mx.concatenate([before, qkv], axis=1)
        state = cache[1] if cache is not None else None
        convolved = self._convolved(conv_input)
        q, k, v = mx.split(convolved, [self.key_dim, 2 * self.key_dim], axis=-1)
        q, k = (x.reshape(batch, length, self.num_k_heads, self.head_k_dim) for x in (q, k))
        v = v.reshape(batch, length, self.num_v_heads, self.head_v_dim)
        q, k = self._normalised(q, k)
        out, after = gated_delta_update(q, k, v, a, b, self.A_log, self.dt_bias, state, mask)
        if cache is not None:
            if cache.lengths is None:
                cache[0] = mx.contiguous(conv_input[:, -size:])
            else:
                cache[0] = _rows_at(conv_input, _real(cache, length), size)
            cache[1] = after
            cache.advance(length)
            if isinstance(cache, RecurrentView) and cache.has_drafts:
                cache.trail = DeltaTrail(self, [conv_input, k, v, a, b], state, cache.host_lengths)
        return self.out_proj(self.norm(out, z).reshape(batch, length, -1))

    def _normalised(self: Any, q: mx.array, k: mx.array) -> tuple[mx.array, mx.array]:
        """Each head to length 1, queries scaled by the root of their size."""
        if "_taps" not in self:
            return normalize_qk(q, k, inv_scale=self.head_k_dim**-0.5, eps=L2_EPS)
        eps = L2_EPS / self.head_k_dim  # it is added to the mean of squares, not to their sum
        return mx.fast.rms_norm(q, self._q_scale, eps), mx.fast.rms_norm(k, self._k_scale, eps)

    def _convolved(self: Any, x: mx.array) -> mx.array:
        return short_convolution(x, self._taps) if "_taps" in self else nn.silu(self.conv1d(x))

    def join(self: Any) -> None:
        """For a GPU. `_taps` (K, C) are the convolution's weights, `_q_scale` and `_k_scale` what norms multiply by."""
        kind, size = self.conv1d.weight.dtype, self.head_k_dim
        self._taps = mx.contiguous(self.conv1d.weight[:, :, 0].T.astype(mx.float32))
        self._q_scale, self._k_scale = mx.full((size,), 1 / size, dtype=kind), mx.full((size,), size**-0.5, dtype=kind)
        mx.eval(self._taps, self._q_scale, self._k_scale)


class GatedDeltaNet(_DeltaNet, qwen3_5.GatedDeltaNet):
    def __call__(self, inputs: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:  # noqa: ANN401
        batch, length, _ = inputs.shape
        if "in_proj" in self:
            ends = [self.conv_dim, self.conv_dim + self.value_dim, -self.num_v_heads]
            qkv, z, b, a = mx.split(self.in_proj(inputs), ends, axis=-1)
        else:
            qkv, z = self.in_proj_qkv(inputs), self.in_proj_z(inputs)
            b, a = self.in_proj_b(inputs), self.in_proj_a(inputs)
        z = z.reshape(batch, length, self.num_v_heads, self.head_v_dim)
        return self._scanned(qkv, z, b, a, mask, cache)

    def join(self) -> None:
        super().join()
        fuse.join(self, ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"], "in_proj")


class NextGatedDeltaNet(_DeltaNet, qwen3_next.Qwen3NextGatedDeltaNet):
    def __call__(self, inputs: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:  # noqa: ANN401
        q, k, v, z, b, a = self.fix_query_key_value_ordering(self.in_proj_qkvz(inputs), self.in_proj_ba(inputs))
        qkv = mx.concatenate([x.reshape(*inputs.shape[:2], -1) for x in (q, k, v)], axis=-1)
        return self._scanned(qkv, z, b, a, mask, cache)


class MLP(qwen3_next.Qwen3NextMLP):
    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" not in self:
            return super().__call__(x)
        return self.down_proj(joined_swiglu(self.gate_up_proj(x)))

    def join(self) -> None:
        fuse.join(self, ["gate_proj", "up_proj"], "gate_up_proj")


OURS: dict[type[nn.Module], type[nn.Module]] = {
    qwen3_next.Qwen3NextAttention: Attention,
    qwen3_5.GatedDeltaNet: GatedDeltaNet,
    qwen3_next.Qwen3NextGatedDeltaNet: NextGatedDeltaNet,
    qwen3_next.Qwen3NextMLP: MLP,
}


def install(model: nn.Module) -> None:
    """Give the layers of one of mlx-lm's models the forwards of this file."""
    for layer in model.layers:
        for module in _modules(layer):
            ours = OURS.get(type(module))
            if ours is not None:
                module.__class__ = ours


def join(model: nn.Module) -> None:
    """For a GPU: fewer launches, and rotation by the attention kernel. Call once, after the weights are in."""
    for layer in model.layers:
        for module in _modules(layer):
            if type(module) in OURS.values():
                module.join()
            if isinstance(module, Attention):
                module.own_rope = plain_rope(getattr(module.rope, "plain", module.rope))  # inside `PlacedRope`


def _modules(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.linear_attn if layer.is_linear else layer.self_attn, layer.mlp


def query_heads(model: nn.Module) -> list[int]:
    """Of each attention layer."""
    return [layer.self_attn.num_attention_heads for layer in model.layers if not layer.is_linear]
