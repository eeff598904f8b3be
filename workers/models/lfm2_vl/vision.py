"""The image encoder: SigLIP 2 on any grid of patches, and a projector of squares of patches to tokens."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workers.models.encoder_parts import activate, squares
from workers.models.lfm2_vl.config import VisionConfig
from workers.models.siglip import Encoder


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.side = config.side
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.layers.hidden_size)
        self.position_embedding = nn.Embedding(config.side**2, config.layers.hidden_size)

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """Patches (n, size * size * 3) that lie in a grid (rows, columns) -> (n, H)."""
        kind = self.patch_embedding.bias.dtype
        return self.patch_embedding(patches.astype(kind)) + self.positions(grid).astype(kind)

    def positions(self, grid: tuple[int, int]) -> mx.array:
        """The square of learned positions, resampled to (rows * columns, H), float32."""
        table = self.position_embedding(mx.arange(self.side**2)).astype(mx.float32)
        down, across = (mx.array(resampling(self.side, length)) for length in grid)
        resampled = down @ table.reshape(self.side, -1)
        return (across @ resampled.reshape(grid[0], self.side, -1)).reshape(grid[0] * grid[1], -1)


def resampling(size: int, length: int) -> np.ndarray:
    """Weights (length, size) float32 of a row's values in the row's resampling to another length.

    Bilinear with antialiasing: triangles around each new value's place, as wide as old values lie apart where the row
    gets longer, as new ones where it gets shorter; they are cut at the row's ends.
    """
    scale = size / length
    width = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    distances = np.abs(np.arange(size) + 0.5 - centres[:, None]) / width
    weights = np.maximum(1.0 - distances, 0.0)
    normalised: np.ndarray = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return normalised


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config.layers)
        self.post_layernorm = nn.LayerNorm(config.layers.hidden_size, config.layers.layer_norm_eps)

    def patches(self, pixels: mx.array, mean: mx.array, std: mx.array) -> mx.array:
        """Normalised patches (rows * columns, size * size * 3) of 8-bit pixels (height, width, 3).

        Args:
            mean, std: (3,) of values in 0..1.
        """
        x = (pixels.astype(mx.float32) * (1 / 255) - mean) / std
        height, width, channels = x.shape
        size = self.patch_size
        x = x.reshape(height // size, size, width // size, size, channels)
        return x.transpose(0, 2, 1, 3, 4).reshape(-1, size * size * channels)

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """(n, H) of patches (n, ...) that lie in a grid (rows, columns)."""
        x = self.embeddings(patches, grid)[None]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)[0]

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names without the tower's prefix: those of the first release to transformers' own; no pooling head."""
        made = {}
        for name, weight in weights.items():
            name = name.removeprefix("vision_model.").removeprefix("vision_")
            if not name.startswith("head."):
                made[name] = weight
        return made


class Projector(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge_size, self.activation = config.merge_size, config.projector_activation
        inputs = config.layers.hidden_size * config.merge_size**2
        if config.has_projector_norm:
            self.layer_norm = nn.LayerNorm(inputs)
        self.linear_1 = nn.Linear(inputs, config.projector_size, bias=config.has_projector_bias)
        self.linear_2 = nn.Linear(config.projector_size, config.output_size, bias=config.has_projector_bias)

    def __call__(self, x: mx.array, grid: tuple[int, int]) -> mx.array:
        """(tokens, H of the decoder) of patches (rows * columns, H): a square's patches side by side, row by row."""
        x = squares(x.reshape(1, *grid, -1), self.merge_size)[0].flatten(2).flatten(0, 1)
        if "layer_norm" in self:
            x = self.layer_norm(x)
        return self.linear_2(activate(self.linear_1(x), self.activation))
