"""Idefics3 and SmolVLM: a Llama decoder with an image encoder and a projection beside it."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from shared.messages import MediaKind
from workers.kernels.choice import Form
from workers.models.base import CausalMedia
from workers.models.beside_text import BesideText
from workers.models.decoder import Model
from workers.models.idefics3.config import Idefics3Config
from workers.models.idefics3.vision import Connector, VisionModel

# What checkpoints call the parts -> what they are called here. Longer names first.
_PREFIXES = {
    "model.vision_model.": "vision_model.",
    "vision_tower.": "vision_model.",
    "model.connector.": "connector.",
    "multi_modal_projector.": "connector.",
    "model.text_model.": "language_model.model.",
    "language_model.model.": "language_model.model.",
    "language_model.lm_head.": "language_model.lm_head.",
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
_ENCODERS = ("vision_model.", "connector.")


class Idefics3(CausalMedia, BesideText):
    """Also a `MediaModel` of workers/models/base.py."""

    def __init__(self, config: Idefics3Config) -> None:
        super().__init__()
        self.config = config
        self.language_model = Model(config.text)
        if config.vision is not None:
            self.vision_model = VisionModel(config.vision)
            self.connector = Connector(config.vision, config.scale_factor, config.text.hidden_size)

    @property
    def modalities(self) -> list[MediaKind]:
        """Frames of a video are encoded as images are; whether a checkpoint takes any, its processor says."""
        return ["image", "video"] if "vision_model" in self else []

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of a tile or frame: `pixels` (height, width, 3) uint8, `mean` and `std` (3,) of 0..1."""
        scaled = (tensors["pixels"].astype(mx.float32) * (1 / 255) - tensors["mean"]) / tensors["std"]
        return self.connector(self.vision_model(scaled[None]))

    @property
    def attention_form(self) -> Form:
        """As the text decoder's."""
        return self.language_model.attention_form

    def join_attention_inputs(self) -> None:
        """As the text decoder's."""
        self.language_model.join_attention_inputs()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names and MLX's to this model's.

        Without weights the encoder is dropped: text-only conversions keep its configuration.
        """
        text: dict[str, mx.array] = {}
        encoders: dict[str, mx.array] = {}
        for name, weight in weights.items():
            name = canonical_name(name)
            if not name.startswith(_ENCODERS):
                text[name.removeprefix("language_model.")] = weight
            elif not name.endswith(".position_ids"):
                # PyTorch has a convolution's weight as (out, channels, height, width), MLX has the channels last.
                is_turned = name.endswith("patch_embedding.weight") and weight.shape[-1] != 3
                encoders[name] = weight.transpose(0, 2, 3, 1) if is_turned else weight
        if not encoders:
            self.pop("vision_model", None)
            self.pop("connector", None)
        text = self.language_model.sanitize(text)
        return {f"language_model.{name}": weight for name, weight in text.items()} | encoders


def canonical_name(name: str) -> str:
    """A tensor's name here, whatever a checkpoint calls it."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
