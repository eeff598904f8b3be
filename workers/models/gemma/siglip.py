"""Gemma 3's image encoder: SigLIP on one square size, average pooling and a projection."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from workers.models.siglip import Encoder, SiglipConfig


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        weight = self.position_embedding.weight
        return self.patch_embedding(pixels.astype(weight.dtype)).flatten(1, 2) + weight


class SiglipTower(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Images (B, 3, image_size, image_size), normalised to -1..1 -> (B, patches, H)."""
        x = self.embeddings(pixels.transpose(0, 2, 3, 1))
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names without transformers 4's `vision_model.`, the convolution's weight as MLX has it, no pooling head."""
        made = {}
        for name, weight in weights.items():
            name = name.replace("vision_tower.vision_model.", "vision_tower.")
            if name.startswith("vision_tower.head.") or name.endswith(".position_ids"):
                continue
            if name.endswith("patch_embedding.weight") and weight.shape[-1] != 3:
                weight = weight.transpose(0, 2, 3, 1)
            made[name] = weight
        return made


class Projector(nn.Module):
    """Pools patches to `num_tokens` and projects them to the text decoder's width."""

    def __init__(self, config: SiglipConfig, num_tokens: int, hidden: int) -> None:
        super().__init__()
        self.side = config.patches_per_side
        self.pooled_side = int(num_tokens**0.5)
        self.eps = config.layer_norm_eps
        self.mm_input_projection_weight = mx.zeros((config.hidden_size, hidden))
        self.mm_soft_emb_norm = nn.RMSNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, patches, H) -> (B, tokens, H of the decoder)."""
        kernel = self.side // self.pooled_side
        used = self.pooled_side * kernel
        grid = x.reshape(x.shape[0], self.side, self.side, -1)[:, :used, :used]
        blocks = grid.reshape(x.shape[0], self.pooled_side, kernel, self.pooled_side, kernel, -1)
        pooled = blocks.mean(axis=(2, 4)).flatten(1, 2)
        # Weights are stored as their difference from one, as in Gemma 3's decoder.
        normed = mx.fast.rms_norm(pooled, 1.0 + self.mm_soft_emb_norm.weight, self.eps)
        return normed @ self.mm_input_projection_weight
