"""Qwen3.5 with images: mlx-lm's text decoder, our image encoder, and positions on three axes in the attention layers.

GatedDeltaNet layers take no positions, so that an image changes nothing else.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_5_moe

from shared.messages import MediaItem
from workers.models.mlxlm import HybridMlxLmModel
from workers.models.qwen.config import AddedVisionConfig
from workers.models.qwen.experts import split_experts
from workers.models.qwen.media import QwenMedia
from workers.models.qwen.model import VISION_PREFIXES
from workers.models.qwen.positions import axial_positions
from workers.models.qwen.text import AxialRope
from workers.models.qwen.vision import VisionTower
from workers.models.rope import Rotate, rotated


class _WithVision(nn.Module):
    """Before one of mlx-lm's classes: keeps the encoder's weights, which those drop."""

    def __init__(self, config: AddedVisionConfig) -> None:
        super().__init__(config.text_args)
        self.vision_config = config
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Without weights the encoder is dropped: text-only conversions keep its configuration."""
        text, vision = {}, {}
        for name, weight in weights.items():
            prefix = next((p for p in VISION_PREFIXES if name.startswith(p)), None)
            if prefix is None:
                text[name] = weight
            else:
                vision[name.removeprefix(prefix)] = weight
        if not vision or self.vision_config.vision is None:
            self.pop("vision_tower", None)
            return super().sanitize(text)
        return super().sanitize(text) | {f"vision_tower.{n}": w for n, w in VisionTower.sanitize(vision).items()}


class Qwen35(_WithVision, qwen3_5.Model):
    pass


class Qwen35MoE(_WithVision, qwen3_5_moe.Model):
    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize(split_experts(weights, self.language_model.args.hidden_size))


CLASSES: dict[str, tuple[type[nn.Module], Any]] = {
    "qwen3_5": (Qwen35, qwen3_5.ModelArgs),
    "qwen3_5_moe": (Qwen35MoE, qwen3_5_moe.ModelArgs),
}


class PlacedRope:
    """In place of the `rope` of all attention layers: turns by the positions of the running forward, if it has any."""

    def __init__(self, plain: nn.Module, axial: AxialRope) -> None:
        self.plain, self._axial = plain, axial
        self._first: mx.array | int | None = None
        self._rotate: Rotate | None = None

    @property
    def is_placed(self) -> bool:
        """Does the running forward turn otherwise than by the cache's positions?"""
        return self._rotate is not None or self._first is not None

    @contextmanager
    def placed(self, positions: mx.array | int | None) -> Iterator[None]:
        """As `AddedVision.hidden` has `positions`; the forward is built inside, evaluated anywhere."""
        if isinstance(positions, mx.array) and positions.ndim == 3:
            self._rotate = self._axial.at_positions(positions)
        else:
            self._first = positions
        try:
            yield
        finally:
            self._first = self._rotate = None

    def __call__(self, x: mx.array, offset: mx.array | int = 0) -> mx.array:
        """x (B, heads, L, dim), of which the first dimensions turn."""
        if self._rotate is None:
            return self.plain(x, offset=offset if self._first is None else self._first)
        dim = self._axial.dim
        return mx.concatenate([rotated(x[..., :dim], self._rotate), x[..., dim:]], axis=-1)


class AddedVision(QwenMedia, HybridMlxLmModel):
    """Also a `MediaModel`, around a model of `CLASSES` that holds an image encoder."""

    def __init__(self, model: nn.Module, architecture: str) -> None:
        self.config: AddedVisionConfig = model.vision_config
        attending = [layer.self_attn for layer in model.layers if "self_attn" in layer]
        axial = AxialRope(self.config.rope, self.config.sections, is_interleaved=True)
        self._rope = PlacedRope(attending[0].rope if attending else None, axial)
        for attention in attending:
            attention.pop("rope")  # a module, which would stay before the attribute
            attention.rope = self._rope
        self.vision_tower = model.vision_tower
        super().__init__(model, architecture)

    def media_positions(self, num_tokens: int, media: Sequence[MediaItem]) -> np.ndarray:
        assert self.config.vision is not None, "the model holds an image encoder"
        return axial_positions(num_tokens, media, self.config.vision.merge_size)

    def hidden(
        self,
        inputs: mx.array,
        cache: Sequence[object] | None = None,
        input_embeddings: mx.array | None = None,
        positions: mx.array | int | None = None,
    ) -> mx.array:
        """(B, L, H) after the final norm; `positions` as `TextDecoder.hidden` has them."""
        with self._rope.placed(positions):
            return super().hidden(inputs, cache, input_embeddings)
