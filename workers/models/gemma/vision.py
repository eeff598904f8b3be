"""Gemma 4's image encoder: patches of any grid, two-dimensional rotation, pooling by blocks of patches.

One image at a time: images differ in their grids, and without padding no mask is needed.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel
from workers.models.gemma.clipped import ClippedLinear


@dataclass(frozen=True)
class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    patch_size: int
    pooling: int  # patches along each side of a block that becomes one token
    num_positions: int  # along each axis
    is_clipped: bool
    is_standardised: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> VisionConfig:
        """Read a `vision_config`.

        Raises:
            BadModel: a malformed field, or an activation, rope type or bias that the encoder does not compute.
        """
        rope = config.get("rope_parameters") or {}
        if (config.get("hidden_activation") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise BadModel(f"vision: hidden_activation {config['hidden_activation']!r} is not supported")
        if rope.get("rope_type", "axial") not in ("axial", "default"):
            raise BadModel(f"vision: rope type {rope['rope_type']!r} is not supported")
        try:
            heads = int(config.get("num_attention_heads") or 12)
            made = cls(
                hidden_size=int(config.get("hidden_size") or 768),
                intermediate_size=int(config.get("intermediate_size") or 3072),
                num_layers=int(config.get("num_hidden_layers") or 16),
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or 64),
                rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
                rope_theta=float(rope.get("rope_theta") or 100.0),
                patch_size=int(config.get("patch_size") or 16),
                pooling=int(config.get("pooling_kernel_size") or 3),
                num_positions=int(config.get("position_embedding_size") or 10_240),
                is_clipped=bool(config.get("use_clipped_linears")),
                is_standardised=bool(config.get("standardize")),
            )
        except (TypeError, ValueError) as error:
            raise BadModel(f"vision: malformed configuration: {error}") from error
        if made.head_dim % 4 or made.num_heads % made.num_kv_heads:
            raise BadModel(f"vision: {made.num_heads} heads of {made.head_dim} over {made.num_kv_heads} kv heads")
        return made


def cut_patches(pixels: mx.array, patch_size: int) -> tuple[mx.array, tuple[int, int]]:
    """(height, width, 3) -> (rows * columns, 3 * patch_size**2) and (rows, columns)."""
    rows, columns, p = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size, patch_size
    patches = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4)
    return patches.reshape(rows * columns, 3 * p * p), (rows, columns)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width, kv_width = (
            config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim,
        )  # fmt: skip
        self.q_proj = ClippedLinear(hidden, width, config.is_clipped)
        self.k_proj = ClippedLinear(hidden, kv_width, config.is_clipped)
        self.v_proj = ClippedLinear(hidden, kv_width, config.is_clipped)
        self.o_proj = ClippedLinear(width, hidden, config.is_clipped)
        self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """Of x (N, H); cos and sin are (N, head_dim)."""
        c, n = self.config, x.shape[0]
        q = self.q_norm(self.q_proj(x).reshape(n, c.num_heads, c.head_dim))
        k = self.k_norm(self.k_proj(x).reshape(n, c.num_kv_heads, c.head_dim))
        v = mx.fast.rms_norm(self.v_proj(x).reshape(n, c.num_kv_heads, c.head_dim), None, c.rms_norm_eps)
        heads = [rows.swapaxes(0, 1)[None] for rows in (_rotate(q, cos, sin), _rotate(k, cos, sin), v)]
        out = mx.fast.scaled_dot_product_attention(*heads, scale=1.0)
        return self.o_proj(out[0].swapaxes(0, 1).reshape(n, c.num_heads * c.head_dim))


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Each half of a head turns by one coordinate; within a half, its two halves are a rotation's components."""
    a, b, c, d = mx.split(x, 4, axis=-1)
    turned = mx.concatenate([-b, a, -d, c], axis=-1)
    return (x * cos[:, None] + turned * sin[:, None]).astype(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = ClippedLinear(config.hidden_size, config.intermediate_size, config.is_clipped)
        self.up_proj = ClippedLinear(config.hidden_size, config.intermediate_size, config.is_clipped)
        self.down_proj = ClippedLinear(config.intermediate_size, config.hidden_size, config.is_clipped)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.ones((2, config.num_positions, config.hidden_size))

    def __call__(self, patches: mx.array, x: mx.array, y: mx.array) -> mx.array:
        table = self.position_embedding_table
        pixels = (2 * (patches - 0.5)).astype(table.dtype)
        return self.input_proj(pixels) + table[0][x] + table[1][y]


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_layers)]


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = Encoder(config)
        if config.is_standardised:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """Soft tokens of one image, before the projection to the text decoder's width.

        Args:
            patches: (rows * columns, 3 * patch_size**2) pixels in 0..1, by rows; within a patch by row, column, colour.
            grid: (rows, columns) of patches, both multiples of `pooling`.
        Returns:
            (rows * columns / pooling**2, H)
        """
        c, (rows, columns) = self.config, grid
        assert patches.shape[0] == rows * columns, f"{patches.shape[0]} patches for a grid of {rows} x {columns}"
        assert max(grid) <= c.num_positions, f"a grid of {rows} x {columns} and {c.num_positions} positions"
        index = mx.arange(rows * columns)
        x, y = index % columns, index // columns
        hidden = self.patch_embedder(patches, x, y)
        cos, sin = self._angles(x, y)
        for layer in self.encoder.layers:
            hidden = layer(hidden, cos, sin)
        k = c.pooling
        blocks = hidden.astype(mx.float32).reshape(rows // k, k, columns // k, k, c.hidden_size)
        # In float32: the scaled sums pass float16's range before they are standardised.
        pooled = blocks.mean(axis=(1, 3)).reshape(-1, c.hidden_size).astype(hidden.dtype).astype(mx.float32)
        pooled = pooled * c.hidden_size**0.5
        if c.is_standardised:
            pooled = (pooled - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return pooled.astype(hidden.dtype)

    def _angles(self, x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        half = self.config.head_dim // 2
        inv_freq = 1.0 / self.config.rope_theta ** (mx.arange(0, half, 2, dtype=mx.float32) / half)
        by_x, by_y = (p[:, None].astype(mx.float32) * inv_freq for p in (x, y))
        angles = mx.concatenate([by_x, by_x, by_y, by_y], axis=-1)
        return mx.cos(angles), mx.sin(angles)
