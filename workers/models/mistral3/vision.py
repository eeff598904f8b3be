"""Pixtral's image encoder, and the two projectors behind it: Mistral 3's, which joins patches, and Llava's."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workers.models.encoder_parts import GatedMLP, activate
from workers.models.mistral3.config import ProjectorConfig, VisionConfig
from workers.models.rope import rotate_halves

NORM_EPS = 1e-5

# Queries that attend at once: where no kernel fuses attention, the scores of 12,100 patches (1540 x 1540 pixels) would
# take 9 GB in one piece.
MAX_QUERIES = 2048


class Attention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        hidden = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.v_proj, self.o_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, hidden, bias=False)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        """x (n, C): all patches of an image attend to each other; cos and sin (n, 1, dim / 2)."""
        n, hidden = x.shape
        dim = hidden // self.num_heads
        q, k, v = (p(x).reshape(n, self.num_heads, dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.swapaxes(0, 1)[None] for y in (rotate_halves(q, cos, sin), rotate_halves(k, cos, sin), v))
        parts = [
            mx.fast.scaled_dot_product_attention(q[:, :, i : i + MAX_QUERIES], k, v, scale=dim**-0.5)
            for i in range(0, n, MAX_QUERIES)
        ]
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return self.o_proj(out[0].swapaxes(0, 1).reshape(n, hidden))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = GatedMLP(config.hidden_size, config.intermediate_size, config.activation, bias=False)
        self.attention_norm = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, NORM_EPS)

    def __call__(self, x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """A module of its own because the parameter names have it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_layers)]


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_conv = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.transformer = Transformer(config)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Features (rows, columns, C * feature layers) of the patches of normalised pixels (height, width, 3)."""
        c = self.config
        patches = self.patch_conv(pixels[None].astype(self.patch_conv.weight.dtype))[0]
        rows, columns = patches.shape[:2]
        x = self.ln_pre(patches.reshape(rows * columns, c.hidden_size))
        angles = mx.array(axial_angles(rows, columns, c.hidden_size // c.num_heads, c.rope_theta))[:, None]
        cos, sin = mx.cos(angles), mx.sin(angles)
        outputs = [x]
        for layer in self.transformer.layers[: max(c.feature_layers)]:
            outputs.append(layer(outputs[-1], cos, sin))
        return mx.concatenate([outputs[i] for i in c.feature_layers], axis=-1).reshape(rows, columns, -1)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names without MLX's `vision_model.`; the convolution's weight as MLX has it, channels last."""
        made = {}
        for name, weight in weights.items():
            name = name.removeprefix("vision_model.")
            if name == "patch_conv.weight" and weight.shape[-1] != 3:
                weight = weight.transpose(0, 2, 3, 1)
            if not name.endswith("inv_freq"):
                made[name] = weight
        return made


def axial_angles(rows: int, columns: int, dim: int, theta: float) -> np.ndarray:
    """(rows * columns, dim / 2) float32: of a head's frequencies in turn one turns by the row, one by the column.

    Those of the rows come first, then those of the columns.
    """
    inv_freq = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    by_row = np.repeat(np.arange(rows, dtype=np.float32), columns)[:, None] * inv_freq[0::2]
    by_column = np.tile(np.arange(columns, dtype=np.float32), rows)[:, None] * inv_freq[1::2]
    return np.concatenate([by_row, by_column], axis=-1).astype(np.float32)


class PatchMerger(nn.Module):
    """Joins neighbouring patches. A channel's values of one block lie together, row by row."""

    def __init__(self, hidden: int, merge_size: int) -> None:
        super().__init__()
        self.merge_size = merge_size
        self.merging_layer = nn.Linear(hidden * merge_size**2, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(rows, columns, C) -> (rows / merge_size, columns / merge_size, C)."""
        m = self.merge_size
        rows, columns, hidden = x.shape
        blocks = x.reshape(rows // m, m, columns // m, m, hidden).transpose(0, 2, 4, 1, 3)
        return self.merging_layer(blocks.reshape(rows // m, columns // m, hidden * m * m))


class Projector(nn.Module):
    def __init__(self, vision: VisionConfig, config: ProjectorConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.merge_size is not None:
            self.norm = nn.RMSNorm(vision.hidden_size, config.norm_eps)
            self.patch_merger = PatchMerger(vision.hidden_size, config.merge_size)
        width = vision.hidden_size * len(vision.feature_layers)
        self.linear_1 = nn.Linear(width, config.output_size, bias=config.has_bias)
        self.linear_2 = nn.Linear(config.output_size, config.output_size, bias=config.has_bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Features (rows, columns, C) of patches -> tokens (rows, columns, H), fewer where patches are joined."""
        if "patch_merger" in self:
            x = self.patch_merger(self.norm(x))
        return self.linear_2(activate(self.linear_1(x), self.activation))
