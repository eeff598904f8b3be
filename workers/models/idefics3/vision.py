"""The image encoder of Idefics3 and SmolVLM: SigLIP whose positions follow the patch grid, and pixel shuffle."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from workers.models.siglip import Encoder, SiglipConfig


def grid_positions(rows: int, columns: int, side: int) -> np.ndarray:
    """(rows * columns,) of the learned square of positions, side x side: each patch takes that of its place in it.

    transformers finds it by dividing in float32, and so gives two neighbours the same position on some grids of `side`
    patches a side; not on those of the released models (26, 27, 32).
    """
    down, across = np.arange(rows) * side // rows, np.arange(columns) * side // columns
    return (down[:, None] * side + across[None]).reshape(-1)


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.side = config.patches_per_side
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        positions = grid_positions(x.shape[1], x.shape[2], self.side)
        return x + self.position_embedding(mx.array(positions)).reshape(1, *x.shape[1:])


class VisionModel(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Normalised images (B, height, width, 3) -> (B, rows, columns, C). What fills no patch is not seen."""
        x = self.embeddings(pixels)
        grid = x.shape
        x = x.flatten(1, 2)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x).reshape(grid)


class Projection(nn.Module):
    """A module of its own because of the parameters' names."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, hidden, bias=False)


class Connector(nn.Module):
    """Pixel shuffle: the features of a square of patches lie side by side in one token, which is projected."""

    def __init__(self, config: SiglipConfig, scale_factor: int, hidden: int) -> None:
        super().__init__()
        self.scale_factor = scale_factor
        self.modality_projection = Projection(config.hidden_size * scale_factor**2, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, rows, columns, C) -> (B, tokens, H)."""
        batch, rows, columns, size = x.shape
        s = self.scale_factor
        blocks = x.reshape(batch, rows // s, s, columns // s, s, size).transpose(0, 1, 3, 2, 4, 5)
        return self.modality_projection.proj(blocks.reshape(batch, rows // s * (columns // s), s * s * size))
