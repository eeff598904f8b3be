"""A multimodal Gemma checkpoint: its text decoder under the names that such checkpoints have."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from workers.cache.spec import LayerSpec
from workers.models.gemma.config import GemmaConfig
from workers.models.gemma.text import TextDecoder

TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder", "multi_modal_projector")


class Gemma(nn.Module):
    """`SplitModel` and `TextModel`; parameters are named as MLX's checkpoints have them (`language_model.model.*`)."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextDecoder(config)

    @property
    def model(self) -> nn.Module:
        """Where taps look for the list of layers."""
        return self.language_model.model

    @property
    def vocab_size(self) -> int:
        return self.language_model.vocab_size

    def layer_specs(self) -> list[LayerSpec]:
        return self.language_model.layer_specs()

    def embed(self, inputs: mx.array) -> mx.array:
        return self.language_model.embed(inputs)

    def hidden(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.language_model.hidden(inputs, cache, input_embeddings)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.language_model.logits(hidden)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.hidden(inputs, cache, input_embeddings))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names, of transformers 4 and 5, and MLX's, to this model's."""
        text: dict[str, mx.array] = {}
        for name, weight in weights.items():
            part = canonical_name(name)
            if part.startswith("language_model."):
                text[part.removeprefix("language_model.")] = weight
        return {f"language_model.{name}": weight for name, weight in self.language_model.sanitize(text).items()}


def canonical_name(name: str) -> str:
    """`model.language_model.layers...` -> `language_model.model.layers...`; towers' names without `model.`."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    bare = name.removeprefix("model.")
    return bare if bare.startswith((*TOWERS, "language_model.")) else name
