"""Mistral 3, Ministral 3 and Pixtral: text decoder, Pixtral's image encoder and projector, named as in MLX's files."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from shared.messages import MediaKind
from workers.kernels.choice import Form
from workers.models import decoder
from workers.models.base import CausalMedia
from workers.models.beside_text import BesideText
from workers.models.checkpoint_names import canonical_name
from workers.models.fp8 import unpacked
from workers.models.mistral3.config import Mistral3Config
from workers.models.mistral3.vision import Projector, VisionTower

IMAGE_PARTS = ("vision_tower", "multi_modal_projector")


class Mistral3(CausalMedia, BesideText):
    """Also a `MediaModel` of workers/models/base.py."""

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__()
        self.config = config
        self.language_model = decoder.Model(config.text)
        if config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.multi_modal_projector = Projector(config.vision, config.projector)

    @property
    def attention_form(self) -> Form:
        """As the text decoder's."""
        return self.language_model.attention_form

    def join_attention_inputs(self) -> None:
        """As the text decoder's."""
        self.language_model.join_attention_inputs()

    @property
    def modalities(self) -> list[MediaKind]:
        return ["image"] if "vision_tower" in self else []

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of an image's rows with the text token between them that ends a row.

        Args:
            tensors: `pixels` (height, width, 3) uint8, their `mean` and `std` (3,), `row_break` (1,), the token.
        """
        pixels = (tensors["pixels"].astype(mx.float32) * (1 / 255) - tensors["mean"]) / tensors["std"]
        image = self.encode_image(pixels)
        rows, columns, hidden = image.shape
        breaks = mx.broadcast_to(self.embed(tensors["row_break"]).astype(image.dtype), (rows, 1, hidden))
        broken = mx.concatenate([image, breaks], axis=1).reshape(rows * (columns + 1), hidden)
        return broken[:-1][None]

    def encode_image(self, pixels: mx.array) -> mx.array:
        """Tokens (rows, columns, H) of normalised pixels (height, width, 3)."""
        return self.multi_modal_projector(self.vision_tower(pixels))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names, of transformers 4 and 5, and MLX's, to this model's.

        Without weights the encoder is dropped: text-only conversions keep its configuration.
        """
        text: dict[str, mx.array] = {}
        vision: dict[str, mx.array] = {}
        projector: dict[str, mx.array] = {}
        for stored, weight in unpacked(weights).items():
            name = canonical_name(stored, IMAGE_PARTS)
            part, _, inner = name.partition(".")
            match part:
                case "vision_tower":
                    vision[inner] = weight
                case "multi_modal_projector":
                    projector[inner] = weight
                case _:
                    text[name.removeprefix("language_model.")] = weight
        if not vision and not projector:
            for part in IMAGE_PARTS:
                self.pop(part, None)
        elif "vision_tower" not in self:
            vision, projector = {}, {}
        if self.config.may_lack_head and "lm_head.weight" not in text:
            self.language_model.tie()
        return {
            **{f"language_model.{n}": w for n, w in self.language_model.sanitize(text).items()},
            **{f"vision_tower.{n}": w for n, w in VisionTower.sanitize(vision).items()},
            **{f"multi_modal_projector.{n}": w for n, w in projector.items()},
        }
