"""What all Qwen models with an image encoder have of `MediaModel` (workers/models/base.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx

from shared.messages import MediaKind
from workers.models.base import CausalMedia
from workers.models.qwen.vision import VisionTower


class QwenMedia(CausalMedia):
    """For a model with a `vision_tower`. Media are not seen whole: text attends causally to their tokens."""

    vision_tower: VisionTower
    hidden: Callable[..., mx.array]
    logits: Callable[[mx.array], mx.array]

    @property
    def modalities(self) -> list[MediaKind]:
        return ["image", "video"]

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """Tokens (1 + deep layers, n, H) of `frames` (T, height, width, 3) uint8 with `mean` and `std`."""
        patches = self.vision_tower.patches(tensors["frames"], tensors["mean"], tensors["std"])
        rows: mx.array = self.vision_tower(patches, (grid[0], grid[1], grid[2]))
        return rows

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[object] | None = None,
        **more: Any,  # noqa: ANN401 - as `hidden` has them
    ) -> mx.array:
        """Logits (B, L, V)."""
        return self.logits(self.hidden(inputs, cache, **more))
