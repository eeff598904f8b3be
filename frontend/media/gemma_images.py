"""Images as Gemma's encoders take them: one square size (Gemma 3), or patches of a grid of the image's shape (Gemma 4).

Source: transformers' image processors with Pillow, from whose output these must not differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Gemma3Images:
    size: int = 896

    def __call__(self, image: Image.Image) -> Pixels:
        """(3, size, size) in -1..1."""
        resized = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        pixels: Pixels = np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) * np.float32(1 / 255)
        return (pixels - np.float32(0.5)) / np.float32(0.5)


@dataclass(frozen=True)
class Gemma4Images:
    """`pooling` patches along each side of a square become one soft token."""

    patch_size: int = 16
    pooling: int = 3
    max_soft_tokens: int = 280

    def __call__(self, image: Image.Image) -> tuple[Pixels, tuple[int, int]]:
        """((rows * columns, 3 * patch_size**2) in 0..1, (rows, columns) of patches)."""
        height, width = self.target_size(image.height, image.width)
        image = image.convert("RGB")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        rows, columns, p = height // self.patch_size, width // self.patch_size, self.patch_size
        patches = pixels.reshape(rows, p, columns, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * columns, -1)
        return patches, (rows, columns)

    def num_tokens(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.pooling**2

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """The largest (height, width) of about this shape within the budget of patches, in whole blocks.

        At most one side rounds to zero, since their product is that of the whole budget; that side gets one block.
        """
        block = self.pooling * self.patch_size
        longest = self.max_soft_tokens * block
        factor = math.sqrt(self.max_soft_tokens * block**2 / (height * width))
        target_height, target_width = (int(factor * side) // block * block for side in (height, width))
        if target_height == 0:
            return block, min(width // height * block, longest)
        if target_width == 0:
            return min(height // width * block, longest), block
        return target_height, target_width
