"""The transformer parts that drafters are made of. Rows are (B, T, ...); B sequences, T rows each."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from shared.errors import BadModel
from workers.drafters.config import DrafterConfig
from workers.models.qwen.experts import SparseMLP
from workers.models.qwen.text import AxialRope
from workers.models.rope import rotated


class Linear:
    """x W^T + b."""

    def __init__(self, weight: mx.array, bias: mx.array | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class RMSNorm:
    def __init__(self, weight: mx.array, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class Weights:
    """The arrays of one checkpoint, handed out by name."""

    def __init__(self, arrays: Mapping[str, mx.array], config: DrafterConfig) -> None:
        self._arrays = arrays
        self._config = config

    @property
    def dtype(self) -> mx.Dtype:
        """Of what the layers compute in."""
        return next(a.dtype for a in self._arrays.values() if mx.issubdtype(a.dtype, mx.floating))

    def has(self, name: str) -> bool:
        return name in self._arrays

    def array(self, name: str) -> mx.array:
        """Raises BadModel: the checkpoint lacks it."""
        if name not in self._arrays:
            raise BadModel(f"{self._config.kind} drafter {self._config.path} lacks the tensor {name}")
        return self._arrays[name]

    def linear(self, name: str) -> Linear:
        return Linear(self.array(name + ".weight"), self._arrays.get(name + ".bias"))

    def norm(self, name: str) -> RMSNorm:
        weight = self.array(name + ".weight")
        if self._config.has_zero_centred_norms:
            weight = weight + 1
        return RMSNorm(weight, self._config.rms_norm_eps)

    def optional_norm(self, name: str) -> RMSNorm | None:
        return self.norm(name) if self.has(name + ".weight") else None


class Attention:
    """Projections, per-head norms, rope and output of one attention layer; the caller holds K/V and mask.

    q/k norms are there when their tensors are; the query projection has an output gate when it is twice as wide as the
    heads (Qwen3.5: per head [query, gate]).
    """

    def __init__(self, weights: Weights, prefix: str, config: DrafterConfig) -> None:
        self.q_proj = weights.linear(prefix + "q_proj")
        self.k_proj = weights.linear(prefix + "k_proj")
        self.v_proj = weights.linear(prefix + "v_proj")
        self.o_proj = weights.linear(prefix + "o_proj")
        self.q_norm = weights.optional_norm(prefix + "q_norm")
        self.k_norm = weights.optional_norm(prefix + "k_norm")
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        width = self.q_proj.weight.shape[0]
        if width not in (self.num_heads * self.head_dim, 2 * self.num_heads * self.head_dim):
            raise BadModel(f"{config.path}: {prefix}q_proj has {width} rows, {self.num_heads}x{self.head_dim} heads")
        if self.k_proj.weight.shape[0] != self.num_kv_heads * self.head_dim:
            raise BadModel(f"{config.path}: {prefix}k_proj has {self.k_proj.weight.shape[0]} rows")
        self.is_gated = width != self.num_heads * self.head_dim
        self._rope = initialize_rope(
            config.rope_dims,
            config.rope_theta,
            config.rope_traditional,
            config.rope_scaling,
            config.max_position_embeddings or None,
        )
        self._axial: AxialRope | None = None
        if config.axial_rope is not None:
            self._axial = AxialRope(config.axial_rope, config.rope_sections, is_interleaved=True)

    @property
    def has_axes(self) -> bool:
        """Whether positions may lie on three axes."""
        return self._axial is not None

    def queries(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array | None]:
        """Queries (B, heads, T, D) and gate (B, T, heads*D) or None; `positions` as `_rotated` has them."""
        b, t, _ = x.shape
        q = self.q_proj(x).reshape(b, t, self.num_heads, -1)
        gate = None
        if self.is_gated:
            q, gate = mx.split(q, 2, axis=-1)
            gate = gate.reshape(b, t, -1)
        if self.q_norm is not None:
            q = self.q_norm(q)
        return self._rotated(q.transpose(0, 2, 1, 3), positions), gate

    def keys_values(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Keys (roped) and values, each (B, kv heads, T, D)."""
        b, t, _ = x.shape
        k = self.k_proj(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        if self.k_norm is not None:
            k = self.k_norm(k)
        v = self.v_proj(x).reshape(b, t, self.num_kv_heads, self.head_dim)
        return self._rotated(k.transpose(0, 2, 1, 3), positions), v.transpose(0, 2, 1, 3)

    def _rotated(self, x: mx.array, positions: mx.array) -> mx.array:
        """x (B, heads, T, D) at int32 positions of rows 0, the others follow: (B,), or (3, B) on three axes."""
        if positions.ndim == 1:
            turned: mx.array = self._rope(x, offset=positions)
            return turned
        assert self._axial is not None, "positions on three axes for a drafter that has one"
        dim = self._axial.dim
        rotate = self._axial.at_positions(positions[:, :, None] + mx.arange(x.shape[2]))
        return mx.concatenate([rotated(x[..., :dim], rotate), x[..., dim:]], axis=-1)

    def output(self, attended: mx.array, gate: mx.array | None) -> mx.array:
        """Output rows (B, T, H) of what the heads put out (B, heads, T, D)."""
        b, _, t, _ = attended.shape
        out = attended.transpose(0, 2, 1, 3).reshape(b, t, -1)
        return self.o_proj(out if gate is None else out * mx.sigmoid(gate))


class MLP:
    """SwiGLU."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.gate_proj = weights.linear(prefix + "gate_proj")
        self.up_proj = weights.linear(prefix + "up_proj")
        self.down_proj = weights.linear(prefix + "down_proj")

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


def sparse_mlp(weights: Weights, prefix: str, config: DrafterConfig) -> SparseMLP:
    """Experts in place of `MLP`, in the form that `split_experts` gives.

    Raises:
        BadModel: a tensor is missing or misshapen.
    """
    shared = weights.array(prefix + "shared_expert.up_proj.weight").shape[0] if config.has_shared_expert else 0
    num_experts, inner, _ = weights.array(prefix + "switch_mlp.up_proj.weight").shape
    made = SparseMLP(config.hidden_size, inner, num_experts, config.num_chosen_experts, shared)
    try:
        made.load_weights([(name, weights.array(prefix + name)) for name, _ in tree_flatten(made.parameters())])
    except ValueError as error:
        raise BadModel(f"{config.path}: {prefix}{error}") from error
    return made


def rows_at_own_positions(attention: Attention, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values, each (N, kv heads, D), of N unrelated rows (N, H) at positions (N,), or (3, N) on three axes."""
    k, v = attention.keys_values(x[:, None], positions)
    return k[:, :, 0], v[:, :, 0]
