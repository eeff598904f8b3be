"""The image encoder: SigLIP on any grid of patches, four of which become one behind one of its layers, and again behind
the last one.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workers.models.encoder_parts import squares
from workers.models.minicpm_v.config import MERGE_SIZE, VisionConfig
from workers.models.siglip import Attention, Encoder, GridEmbeddings, SiglipConfig

MERGER_EPS = 1e-6


class WindowMerger(nn.Module):
    """The patches of a square attend to each other, then become one: their mean, and what an MLP makes of them."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        num, hidden = MERGE_SIZE**2, config.hidden_size
        self.self_attn = Attention(config)
        self.layer_norm1 = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.pre_norm = nn.LayerNorm(num * hidden, config.layer_norm_eps)
        self.linear_1 = nn.Linear(num * hidden, num * config.intermediate_size)
        self.linear_2 = nn.Linear(num * config.intermediate_size, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, rows, columns, C) -> (B, rows / 2, columns / 2, C)."""
        windows = squares(x, MERGE_SIZE)
        grid = windows.shape[:3]
        windows = windows.flatten(0, 2)
        windows = windows + self.self_attn(self.layer_norm1(windows))
        joined = self.pre_norm(windows.flatten(1))
        merged = self.linear_2(nn.gelu_approx(self.linear_1(joined))) + windows.mean(axis=1)
        return merged.reshape(*grid, -1)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merged_layer = config.merged_layer
        self.embeddings = GridEmbeddings(config.layers)
        self.encoder = Encoder(config.layers)
        self.post_layernorm = nn.LayerNorm(config.layers.hidden_size, config.layers.layer_norm_eps)

    def __call__(self, pixels: mx.array, merger: WindowMerger | None) -> mx.array:
        """Normalised images (B, height, width, 3) -> (B, rows, columns, C).

        Args:
            merger: of the patches behind `merged_layer`; it lies beside the encoder, where MLX's checkpoints have it.
        """
        x = self.embeddings(pixels)
        grid = x.shape
        x = x.flatten(1, 2)
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x)
            if i == self.merged_layer:
                assert merger is not None, "the configuration tells of a merger"
                merged = merger(x.reshape(grid))
                grid, x = merged.shape, merged.flatten(1, 2)
        return self.post_layernorm(x).reshape(grid)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The convolution's weight as MLX has it, with the channels last."""
        made = {}
        for name, weight in weights.items():
            is_turned = name.endswith("patch_embedding.weight") and weight.shape[-1] != 3
            if not name.endswith(".position_ids"):
                made[name] = weight.transpose(0, 2, 3, 1) if is_turned else weight
        return made


class MergerMLP(nn.Module):
    def __init__(self, size: int, output_size: int) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(size, MERGER_EPS)
        self.linear_1, self.linear_2 = nn.Linear(size, size), nn.Linear(size, output_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_2(nn.gelu(self.linear_1(self.pre_norm(x))))


class Merger(nn.Module):
    """From patches to tokens, in rounds of four to one; the last one has the text decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden = config.layers.hidden_size
        outputs = [hidden] * (config.merger_times - 1) + [config.output_size]
        self.mlp = [MergerMLP(hidden * MERGE_SIZE**2, output) for output in outputs]

    def __call__(self, x: mx.array) -> mx.array:
        """(B, rows, columns, C) -> (B, tokens, H)."""
        for mlp in self.mlp:
            x = mlp(squares(x, MERGE_SIZE).flatten(3))
        return x.flatten(1, 2)
