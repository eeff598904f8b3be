"""What `gemma4_unified` has in place of encoders: one projection of patches of pixels, and one of frames of samples.

Frames need only `MediaEmbedder`. A patch is a square of pixels that becomes one token; its place in the image is added
from a table for each axis.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel
from workers.models.gemma.clipped import MediaEmbedder


@dataclass(frozen=True)
class UnifiedVisionConfig:
    patch_size: int  # pixels along each side of what becomes one token
    hidden_size: int
    num_positions: int  # along each axis
    rms_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> UnifiedVisionConfig:
        """Read a `vision_config`.

        Raises:
            BadModel: a malformed field, or a projection whose width differs from its input's.
        """
        try:
            made = cls(
                patch_size=int(config.get("patch_size") or 16) * int(config.get("pooling_kernel_size") or 3),
                hidden_size=int(config.get("mm_embed_dim") or 3840),
                num_positions=int(config.get("mm_posemb_size") or 1120),
                rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            )
            output_size = int(config.get("output_proj_dims") or made.hidden_size)
        except (TypeError, ValueError) as error:
            raise BadModel(f"vision: malformed configuration: {error}") from error
        if output_size != made.hidden_size:
            raise BadModel(f"vision: output_proj_dims {output_size} differs from mm_embed_dim {made.hidden_size}")
        return made


@dataclass(frozen=True)
class UnifiedAudioConfig:
    frame_size: int  # samples that become one token
    rms_norm_eps: float

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> UnifiedAudioConfig:
        """Read an `audio_config`.

        Raises:
            BadModel: a malformed field.
        """
        try:
            return cls(int(config.get("audio_embed_dim") or 640), float(config.get("rms_norm_eps") or 1e-6))
        except (TypeError, ValueError) as error:
            raise BadModel(f"audio: malformed configuration: {error}") from error


class UnifiedVisionEmbedder(nn.Module):
    def __init__(self, config: UnifiedVisionConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        pixels, width = 3 * config.patch_size**2, config.hidden_size
        self.patch_ln1 = nn.LayerNorm(pixels)
        self.patch_dense = nn.Linear(pixels, width)
        self.patch_ln2 = nn.LayerNorm(width)
        self.pos_embedding = mx.zeros((config.num_positions, 2, width))
        self.pos_norm = nn.LayerNorm(width)
        self.multimodal_embedder = MediaEmbedder(width, hidden, config.rms_norm_eps)

    def __call__(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """(rows * columns, 3 * patch_size**2) pixels in 0..1, by rows, as `cut_patches` gives them -> (tokens, H)."""
        rows, columns = grid
        assert patches.shape[0] == rows * columns, f"{patches.shape[0]} patches for a grid of {rows} x {columns}"
        assert max(grid) <= self.config.num_positions, f"a grid of {grid} and {self.config.num_positions} positions"
        x = patches.astype(self.pos_embedding.dtype)
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(x)))
        index = mx.arange(rows * columns)
        x = x + self.pos_embedding[index % columns, 0] + self.pos_embedding[index // columns, 1]
        return self.multimodal_embedder(self.pos_norm(x))

    @staticmethod
    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The original checkpoints have the part before the projection under a name of its own."""
        made = {}
        for name, weight in weights.items():
            name = name.replace("vision_embedder.", "embed_vision.", 1)
            if name.startswith("embed_vision.embedding_projection."):
                name = name.replace("embed_vision.", "embed_vision.multimodal_embedder.", 1)
            made[name] = weight
        return made
