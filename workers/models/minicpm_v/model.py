"""MiniCPM-V 4.6: mlx-lm's Qwen3.5 and our image encoder under the names that MLX's checkpoints have.

An image's tokens have the positions of text, so that the text decoder runs as it does without images.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import qwen3_5

from shared.messages import MediaKind
from workers.models.base import CausalMedia
from workers.models.minicpm_v.config import MiniCpmVConfig
from workers.models.minicpm_v.vision import Merger, VisionTower, WindowMerger
from workers.models.mlxlm import HybridMlxLmModel

PARTS = ("vision_tower", "vit_merger", "merger")


class MiniCpmV(qwen3_5.Model):
    """The weights."""

    def __init__(self, config: MiniCpmVConfig) -> None:
        super().__init__(config.text_args)
        self.config = config
        if (vision := config.vision) is not None:
            self.vision_tower = VisionTower(vision)
            if vision.merged_layer is not None:
                self.vit_merger = WindowMerger(vision.layers)
            self.merger = Merger(vision)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names and MLX's to this model's.

        Without weights the encoder is dropped: text-only conversions keep its configuration. So is a head that the
        configuration tells of and the checkpoint does not hold.
        """
        text: dict[str, mx.array] = {}
        parts: dict[str, dict[str, mx.array]] = {part: {} for part in PARTS}
        for name, weight in weights.items():
            # Hugging Face's files have the encoder's merger inside of it.
            part, _, inner = (
                name.removeprefix("model.").replace("vision_tower.vit_merger.", "vit_merger.").partition(".")
            )
            if part in parts:
                parts[part][inner] = weight
            else:
                text[name] = weight
        made = super().sanitize(text)
        decoder = self.language_model
        if "language_model.lm_head.weight" not in made:
            decoder.args.tie_word_embeddings = True
            decoder.pop("lm_head", None)
        elif decoder.args.tie_word_embeddings:
            made = {name: weight for name, weight in made.items() if not name.startswith("language_model.lm_head.")}
        if not parts["vision_tower"]:
            for part in PARTS:
                self.pop(part, None)
        parts["vision_tower"] = VisionTower.sanitize(parts["vision_tower"])
        kept = {part: held for part, held in parts.items() if part in self}  # no `vit_merger` where it is not used
        return made | {f"{part}.{name}": weight for part, held in kept.items() for name, weight in held.items()}


class ReadyMiniCpmV(CausalMedia, HybridMlxLmModel):
    """Around a `MiniCpmV`: also a `MediaModel`."""

    model: Any

    @property
    def modalities(self) -> list[MediaKind]:
        return ["image"] if "vision_tower" in self.model else []

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of `pixels` (height, width, 3) uint8 with `mean` and `std`: an image or a slice."""
        pixels = (tensors["pixels"].astype(mx.float32) * (1 / 255) - tensors["mean"]) / tensors["std"]
        return self.encode_image(pixels[None])

    def encode_image(self, pixels: mx.array) -> mx.array:
        """Tokens (B, num_tokens, H) of normalised pixels (B, height, width, 3)."""
        merger = self.model.vit_merger if "vit_merger" in self.model else None
        return self.model.merger(self.model.vision_tower(pixels, merger))
