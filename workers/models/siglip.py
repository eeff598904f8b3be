"""SigLIP's layers, and SigLIP 2's: what image encoders of several families have between embedding and projection."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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


def grid_positions(rows: int, columns: int, side: int) -> np.ndarray:
    """(rows * columns,) of the learned square of positions, side x side: each patch takes that of its place in it.

    transformers finds it by dividing in float32, and so gives two neighbours the same position on some grids of `side`
    patches a side; not on those of the released models (26, 27, 32, 70).
    """
    down, across = np.arange(rows) * side // rows, np.arange(columns) * side // columns
    return (down[:, None] * side + across[None]).reshape(-1)


class GridEmbeddings(nn.Module):
    """Of images of any shape."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.side = config.patches_per_side
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Embedding(self.side**2, config.hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """Normalised images (B, height, width, 3) -> (B, rows, columns, C). What fills no patch is not seen."""
        x = self.patch_embedding(pixels.astype(self.patch_embedding.weight.dtype))
        positions = grid_positions(x.shape[1], x.shape[2], self.side)
        return x + self.position_embedding(mx.array(positions)).reshape(1, *x.shape[1:])


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
