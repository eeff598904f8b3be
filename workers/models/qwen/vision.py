"""The image encoders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

Patches come in blocks of merge_size x merge_size, so that the merger joins neighbours. Each frame (two of a video)
attends to itself; Qwen2.5-VL attends within windows in most layers, Qwen3-VL adds learned positions and gives the
outputs of some layers to the text decoder too.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workers.models.encoder_parts import GatedMLP, activate
from workers.models.qwen.config import VisionConfig
from workers.models.rope import rotate_halves

NORM_EPS = 1e-6


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, lengths: Sequence[int]) -> mx.array:
        """x (n, C); each of `lengths` patches in turn attend to each other."""
        n = x.shape[0]
        qkv = self.qkv(x).reshape(n, 3, self.num_heads, self.head_dim)
        q, k, v = rotate_halves(qkv[:, 0], cos, sin), rotate_halves(qkv[:, 1], cos, sin), qkv[:, 2]
        parts, first = [], 0
        for length, count in _runs(lengths):
            end = first + length * count
            shape = (count, length, self.num_heads, self.head_dim)
            a, b, c = (y[first:end].reshape(shape).swapaxes(1, 2) for y in (q, k, v))
            out = mx.fast.scaled_dot_product_attention(a, b, c, scale=self.head_dim**-0.5)
            parts.append(out.swapaxes(1, 2).reshape(length * count, -1))
            first = end
        return self.proj(parts[0] if len(parts) == 1 else mx.concatenate(parts))


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """(length, how many in a row)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


class PlainMLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(activate(self.fc1(x), self.activation))


def _gated(config: VisionConfig) -> GatedMLP:
    return GatedMLP(config.hidden_size, config.intermediate_size, config.activation, bias=True)


def _norm(size: int, config: VisionConfig) -> nn.Module:
    return nn.RMSNorm(size, NORM_EPS) if config.is_gated else nn.LayerNorm(size, NORM_EPS)


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(config.hidden_size, config), _norm(config.hidden_size, config)
        self.attn = Attention(config)
        self.mlp = _gated(config) if config.is_gated else PlainMLP(config)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array, lengths: Sequence[int]) -> mx.array:
        x = x + self.attn(self.norm1(x), cos, sin, lengths)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Joins each block of patches to one token; `norms_joined`: the norm sees the joined ones."""

    def __init__(self, config: VisionConfig, norms_joined: bool = False) -> None:
        super().__init__()
        self.size = config.hidden_size * config.merge_size**2
        self.norms_joined = norms_joined
        self.norm = _norm(self.size if norms_joined else config.hidden_size, config)
        self.fc1 = nn.Linear(self.size, self.size)
        self.fc2 = nn.Linear(self.size, config.output_size)

    def __call__(self, x: mx.array) -> mx.array:
        joined = self.norm(x.reshape(-1, self.size)) if self.norms_joined else self.norm(x).reshape(-1, self.size)
        return self.fc2(nn.gelu(self.fc1(joined)))


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.patch_embed = nn.Linear(patch, config.hidden_size, bias=config.num_positions is not None)
        if config.num_positions is not None:
            self.pos_embed = nn.Embedding(config.num_positions, config.hidden_size)
        self.blocks = [Block(config) for _ in range(config.depth)]
        self.merger = Merger(config)
        self.deep_mergers = [Merger(config, norms_joined=True) for _ in config.deep_layers]

    def patches(self, frames: mx.array, mean: mx.array, std: mx.array) -> mx.array:
        """Normalised patches (t * rows * columns, channels * frames * height * width) of 8-bit frames.

        Args:
            frames: (T, height, width, 3) uint8; an odd last one is repeated.
            mean, std: (3,) of values in 0..1.
        """
        c = self.config
        x = (frames.astype(mx.float32) * (1 / 255) - mean) / std
        missing = -x.shape[0] % c.temporal_patch_size
        if missing:
            x = mx.concatenate([x, mx.repeat(x[-1:], missing, axis=0)])
        t, h, w, channels = x.shape
        m, p = c.merge_size, c.patch_size
        x = x.reshape(t // c.temporal_patch_size, c.temporal_patch_size, h // p // m, m, p, w // p // m, m, p, channels)
        return x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * c.temporal_patch_size * p * p)

    def __call__(self, patches: mx.array, grid: tuple[int, int, int]) -> mx.array:
        """Tokens (1 + deep layers, n / merge_size**2, H) of patches (n, ...) that lie in a grid (t, rows, columns)."""
        c = self.config
        rows, columns = block_positions(grid, c.merge_size)
        x = self.patch_embed(patches.astype(self.merger.fc1.bias.dtype))
        if c.num_positions is not None:
            x = x + self._learned(rows, columns, grid).astype(x.dtype)
        size = c.hidden_size // c.num_heads // 2
        inv_freq = 1.0 / c.rope_theta ** (np.arange(0, size, 2, dtype=np.float32) / size)
        angles = np.concatenate([rows[:, None] * inv_freq, columns[:, None] * inv_freq], axis=-1).astype(np.float32)
        frame = [grid[1] * grid[2]] * grid[0]
        windows: Sequence[int] = frame
        back = None
        if c.window is not None:
            order, windows = window_order(grid, c.merge_size, c.window)
            x, angles = x[mx.array(order)], angles[order]
            unit = c.merge_size**2
            back = mx.array(np.argsort(order[::unit] // unit))
        cos, sin = mx.cos(mx.array(angles))[:, None], mx.sin(mx.array(angles))[:, None]
        deep = []
        for i, block in enumerate(self.blocks):
            is_full = c.full_layers is None or i in c.full_layers
            x = block(x, cos, sin, frame if is_full else windows)
            if i in c.deep_layers:
                deep.append(self.deep_mergers[c.deep_layers.index(i)](x))
        merged = self.merger(x)
        return mx.stack([merged if back is None else merged[back], *deep])

    def _learned(self, rows: np.ndarray, columns: np.ndarray, grid: tuple[int, int, int]) -> mx.array:
        """The learned square of positions, resampled bilinearly so that corners meet."""
        assert self.config.num_positions is not None, "an encoder with learned positions"
        side = int(self.config.num_positions**0.5)
        total = mx.zeros((1,))
        for row, row_weight in _taps(rows, grid[1], side):
            for column, column_weight in _taps(columns, grid[2], side):
                weight = mx.array((row_weight * column_weight)[:, None])
                total = total + self.pos_embed(mx.array(row * side + column)) * weight
        return total

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names of the checkpoints of all three, without their prefix, to those here; convolutions to products."""
        made = {}
        for name, weight in weights.items():
            for old, new in RENAMED:
                name = name.replace(old, new)
            if name == "patch_embed.weight" and weight.ndim == 5:
                # PyTorch has (out, channels, frames, height, width), MLX has the channels last.
                if weight.shape[-1] < weight.shape[-2]:
                    weight = weight.transpose(0, 4, 1, 2, 3)
                weight = weight.reshape(weight.shape[0], -1)
            if not name.endswith("inv_freq"):
                made[name] = weight
        return made


RENAMED = (
    ("patch_embed.proj.", "patch_embed."), ("deepstack_merger_list.", "deep_mergers."),
    ("merger.ln_q.", "merger.norm."), ("merger.mlp.0.", "merger.fc1."), ("merger.mlp.2.", "merger.fc2."),
    ("linear_fc", "fc"),
)  # fmt: skip


def block_positions(grid: tuple[int, int, int], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each patch, in the order patches come in; both (t * rows * columns,)."""
    t, h, w = grid
    shape = (h // merge, merge, w // merge, merge)
    axes = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    rows, columns = (np.tile(axis.reshape(shape).swapaxes(1, 2).reshape(-1), t) for axis in axes)
    return rows, columns


def window_order(grid: tuple[int, int, int], merge: int, window: int) -> tuple[np.ndarray, list[int]]:
    """Patches by window, and the windows' sizes in patches; the last window of a row or column may be smaller."""
    t, h, w = grid[0], grid[1] // merge, grid[2] // merge
    index = np.arange(t * h * w).reshape(t, h, w)
    blocks = [
        index[frame, i : i + window, j : j + window].reshape(-1)
        for frame in range(t)
        for i in range(0, h, window)
        for j in range(0, w, window)
    ]
    unit = merge * merge
    order = (np.concatenate(blocks)[:, None] * unit + np.arange(unit)).reshape(-1)
    return order, [len(block) * unit for block in blocks]


def _taps(index: np.ndarray, size: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The two neighbours in the learned axis and their weights."""
    source = (index.astype(np.float32) * np.float32(side - 1)) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    share = source - low
    first = low.astype(np.int32)
    return [(first, 1 - share), (np.minimum(first + 1, side - 1), share)]
