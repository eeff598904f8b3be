"""The image encoder of Idefics3 and SmolVLM: SigLIP whose positions follow the patch grid, and pixel shuffle."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workers.models.encoder_parts import squares
from workers.models.siglip import Encoder, GridEmbeddings, SiglipConfig


class VisionModel(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.embeddings = GridEmbeddings(config)
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
        return self.modality_projection.proj(squares(x, self.scale_factor).flatten(3).flatten(1, 2))
