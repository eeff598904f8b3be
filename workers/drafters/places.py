"""Rope positions of a drafter whose target counts them on three axes (Qwen3.5): behind an image they lie closer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shared.messages import MediaItem
from workers.models.qwen.positions import axial_positions


class TokenPlaces:
    """Args:
    media: all of a prompt, in order.
    """

    def __init__(self, media: Sequence[MediaItem]) -> None:
        first, last = media[0], media[-1]
        end = last.start + last.num_tokens
        merge_size = math.isqrt(math.prod(first.grid) // first.num_tokens)
        self._known = axial_positions(end + 1, media, merge_size)
        self._shift = int(self._known[0, end]) - end

    def at(self, index: int) -> np.ndarray:
        """Time, height and width (3,) of a token, by its place in the sequence."""
        if index < self._known.shape[1]:
            return self._known[:, index]
        return np.full((3,), index + self._shift, dtype=np.int32)
