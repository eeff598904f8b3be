"""A Qwen-VL model: text decoder and image encoder under the names that MLX's checkpoints have."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from shared.messages import MediaItem, MediaKind
from workers.models.beside_text import BesideText
from workers.models.qwen.config import QwenConfig
from workers.models.qwen.media import QwenMedia
from workers.models.qwen.positions import axial_positions
from workers.models.qwen.text import TextDecoder
from workers.models.qwen.vision import VisionTower

VISION_PREFIXES = ("model.visual.", "visual.", "vision_tower.")


class QwenVL(QwenMedia, BesideText):
    """Also a `MediaModel` of workers/models/base.py."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextDecoder(config)
        self.vision_tower = VisionTower(config.vision)

    @property
    def modalities(self) -> list[MediaKind]:
        return super().modalities if "vision_tower" in self else []

    def media_positions(self, num_tokens: int, media: Sequence[MediaItem]) -> np.ndarray:
        return axial_positions(num_tokens, media, self.config.vision.merge_size, self.config.temporal_scale)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names, of transformers 4 and 5, and MLX's, to this model's.

        Without weights the encoder is dropped: text-only conversions keep its configuration.
        """
        text: dict[str, mx.array] = {}
        vision: dict[str, mx.array] = {}
        for name, weight in weights.items():
            prefix = next((p for p in VISION_PREFIXES if name.startswith(p)), None)
            if prefix is not None:
                vision[name.removeprefix(prefix)] = weight
            elif name.startswith("model.language_model."):
                text["model." + name.removeprefix("model.language_model.")] = weight
            else:
                text[name.removeprefix("language_model.")] = weight
        if not vision:
            self.pop("vision_tower", None)
        text, vision = self.language_model.sanitize(text), VisionTower.sanitize(vision)
        return {f"language_model.{n}": w for n, w in text.items()} | {f"vision_tower.{n}": w for n, w in vision.items()}
