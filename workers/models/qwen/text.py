"""The text decoder of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: Qwen2's or Qwen3's with positions on three axes, and experts
in place of MLPs where the configuration has them.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from workers.models import decoder
from workers.models.base import LayerCache, NoCache
from workers.models.qwen.config import QwenConfig
from workers.models.qwen.experts import SparseMLP, split_experts
from workers.models.rope import Rope, RopeParameters, Rotate, rotate_halves


class AxialRope(Rope):
    """Each frequency turns by the position on one of three axes: time, height, width."""

    def __init__(self, parameters: RopeParameters, sections: Sequence[int], is_interleaved: bool) -> None:
        super().__init__(parameters)
        axes = np.zeros(self.dim // 2, dtype=np.int32)
        if is_interleaved:
            for axis in (1, 2):
                axes[axis : sections[axis] * 3 : 3] = axis
        else:
            axes[:] = np.repeat(np.arange(3), sections)
        self._axes = axes

    def at_positions(self, positions: mx.array) -> Rotate:
        """The rotation for tokens at positions (3, B, L)."""
        by_frequency = positions.transpose(1, 2, 0)[..., mx.array(self._axes)]  # (B, L, dim / 2)
        angles = by_frequency.astype(mx.float32)[:, :, None] * self._inv_freq
        cos, sin = mx.cos(angles) * self._factor, mx.sin(angles) * self._factor
        return lambda x: rotate_halves(x, cos, sin)


class TextDecoder(decoder.Model):
    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config.text)
        self._axial_rope = AxialRope(config.text.rope, config.sections, config.is_interleaved)
        if (shape := config.experts) is not None:
            for i in shape.layers:
                self.model.layers[i].mlp = SparseMLP(
                    config.text.hidden_size, shape.intermediate_size, shape.num_experts, shape.num_chosen
                )

    def hidden(
        self,
        inputs: mx.array,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
        positions: mx.array | int | None = None,
        deep_embeddings: mx.array | None = None,
    ) -> mx.array:
        """(B, L, H) after the final norm.

        Args:
            positions: of each row's first token, (B,) or one number, the others follow; or of every token on
                every axis (3, B, L). None: as the cache counts.
            deep_embeddings: (D, B, L, H), added to the output of the first D layers.
        """
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        caches: Sequence[LayerCache] = [NoCache()] * len(self.model.layers) if cache is None else cache
        if isinstance(positions, mx.array) and positions.ndim == 3:
            rotate = self._axial_rope.at_positions(positions)
        else:
            offset = caches[0].offset if positions is None else positions
            rotate = self._rope.at(offset, x.shape[1], x.shape[0], self.is_cpu)
        num_deep = 0 if deep_embeddings is None else deep_embeddings.shape[0]
        for i, (layer, layer_cache) in enumerate(zip(self.model.layers, caches, strict=True)):
            x = layer(x, rotate, layer_cache)
            if i < num_deep and deep_embeddings is not None:
                x = x + deep_embeddings[i]
        return self.model.norm(x)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """As `decoder.Model.sanitize`; experts in the form that the layers have."""
        return super().sanitize(split_experts(weights, self.config.hidden_size))
