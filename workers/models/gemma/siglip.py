"""Gemma 3's image encoder: SigLIP on one square size, average pooling and a projection."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel


@dataclass(frozen=True)
class SiglipConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> SiglipConfig:
        """Read a `vision_config`.

        Raises:
            BadModel: a malformed field, or something that the encoder does not compute.
        """
        if (activation := config.get("hidden_act") or "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
            raise BadModel(f"vision: hidden_act {activation!r} is not supported")
        try:
            made = cls(
                hidden_size=int(config.get("hidden_size") or 768),
                intermediate_size=int(config.get("intermediate_size") or 3072),
                num_layers=int(config.get("num_hidden_layers") or 12),
                num_heads=int(config.get("num_attention_heads") or 12),
                image_size=int(config.get("image_size") or 224),
                patch_size=int(config.get("patch_size") or 16),
                layer_norm_eps=float(config.get("layer_norm_eps") or 1e-6),
            )
        except (TypeError, ValueError) as error:
            raise BadModel(f"vision: malformed configuration: {error}") from error
        if made.hidden_size % made.num_heads:
            raise BadModel(f"vision: {made.num_heads} heads share a width of {made.hidden_size}")
        return made

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(config.patches_per_side**2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        weight = self.position_embedding.weight
        return self.patch_embedding(pixels.astype(weight.dtype)).flatten(1, 2) + weight


class Attention(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        hidden = config.hidden_size
        self.q_proj, self.k_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.v_proj, self.out_proj = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        batch, length, hidden = x.shape
        dim = hidden // self.num_heads
        q, k, v = (
            projection(x).reshape(batch, length, self.num_heads, dim).swapaxes(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=dim**-0.5)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(nn.gelu_approx(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.layers = [Layer(config) for _ in range(config.num_layers)]


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
