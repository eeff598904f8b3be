"""An LFM2-VL model: mlx-lm's text decoder and our image encoder under the names that MLX's checkpoints have."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import lfm2

from shared.messages import MediaKind
from workers.models.base import CausalMedia
from workers.models.lfm2_vl.config import Lfm2VlConfig
from workers.models.lfm2_vl.vision import Projector, VisionTower
from workers.models.mlxlm import ShortConvolutionModel

PARTS = ("vision_tower", "multi_modal_projector")


class TextDecoder(lfm2.Model):
    """mlx-lm's, whose head may be one of its own."""

    def __init__(self, config: Lfm2VlConfig) -> None:
        super().__init__(config.text)
        if not config.is_tied:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        if "lm_head" not in self:
            return super().__call__(inputs, cache, input_embeddings)
        return self.lm_head(self.model(inputs, cache, input_embeddings))


class Lfm2Vl(nn.Module):
    """The weights."""

    def __init__(self, config: Lfm2VlConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextDecoder(config)
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config.vision)

    @property
    def model(self) -> nn.Module:
        return self.language_model.model

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        return self.language_model.make_cache()

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.language_model(inputs, cache, input_embeddings)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names, of transformers 4 and 5, and MLX's, to this model's.

        Without weights the encoder is dropped: text-only conversions keep its configuration. So is a head that the
        configuration tells of and the checkpoint, as MLX's, does not hold.
        """
        text: dict[str, mx.array] = {}
        vision: dict[str, mx.array] = {}
        projector: dict[str, mx.array] = {}
        for name, weight in weights.items():
            bare = name.removeprefix("model.") if name.startswith(("model.language_model.", *_PREFIXED)) else name
            if bare.startswith("vision_tower."):
                vision[bare.removeprefix("vision_tower.")] = weight
            elif bare.startswith("multi_modal_projector."):
                projector[bare] = weight
            elif name.startswith("model.language_model."):
                text["model." + bare.removeprefix("language_model.")] = weight
            else:
                text[bare.removeprefix("language_model.")] = weight
        decoder = self.language_model
        if self.config.is_tied:
            text = {name: weight for name, weight in text.items() if not name.startswith("lm_head.")}
        elif "lm_head.weight" not in text:
            decoder.pop("lm_head")
        made = {f"language_model.{name}": weight for name, weight in decoder.sanitize(text).items()}
        if not vision or "vision_tower" not in self:
            for part in PARTS:
                self.pop(part, None)
            return made
        return made | projector | {f"vision_tower.{name}": w for name, w in VisionTower.sanitize(vision).items()}


_PREFIXED = tuple(f"model.{part}." for part in PARTS)


class ReadyLfm2Vl(CausalMedia, ShortConvolutionModel):
    """Around an `Lfm2Vl`: also a `MediaModel`."""

    model: Any

    @property
    def modalities(self) -> list[MediaKind]:
        return ["image"] if "vision_tower" in self.model else []

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of `pixels` (height, width, 3) uint8 with `mean` and `std`: an image, or a tile of one."""
        patches = self.model.vision_tower.patches(tensors["pixels"], tensors["mean"], tensors["std"])
        return self.encode_image(patches, (grid[1], grid[2]))[None]

    def encode_image(self, patches: mx.array, grid: tuple[int, int]) -> mx.array:
        """Patches (rows * columns, size * size * 3) -> (tokens, H)."""
        return self.model.multi_modal_projector(self.model.vision_tower(patches, grid), grid)
