"""Models with encoders beside a text decoder of ours: whatever is asked about text, the decoder answers."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from workers.cache.spec import LayerSpec


class BesideText(nn.Module):
    """`SplitModel` and `TextModel` of workers/models/base.py by way of the part `language_model`, which is both."""

    packs_rows = True  # those without media
    language_model: Any

    @property
    def model(self) -> nn.Module:
        """Where taps look for the list of layers."""
        return self.language_model.model

    @property
    def vocab_size(self) -> int:
        return self.language_model.vocab_size

    def layer_specs(self) -> list[LayerSpec]:
        return self.language_model.layer_specs()

    def query_heads(self) -> list[int]:
        """As the text decoder's."""
        return self.language_model.query_heads()

    def fuse(self) -> None:
        self.language_model.fuse()

    def embed(self, inputs: mx.array) -> mx.array:
        return self.language_model.embed(inputs)

    def hidden(
        self,
        inputs: mx.array,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
        **more: Any,  # noqa: ANN401 - what the family's decoder takes besides
    ) -> mx.array:
        """As the text decoder's."""
        return self.language_model.hidden(inputs, cache, input_embeddings, **more)

    def logits(self, hidden: mx.array) -> mx.array:
        return self.language_model.logits(hidden)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.hidden(inputs, cache, input_embeddings))
