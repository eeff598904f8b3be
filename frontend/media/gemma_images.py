"""Images at the sizes that Gemma's encoders take: one square (Gemma 3 and 3n), or the image's own shape (Gemma 4).

Source: transformers' image processors with Pillow, from whose output these must not differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SOFT_TOKEN_BUDGETS = (70, 140, 280, 560, 1120)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Gemma3Images:
    size: int = 896
    resampling: Image.Resampling = Image.Resampling.BILINEAR

    def resized(self, image: Image.Image) -> Pixels:
        """(size, size, 3)"""
        return np.asarray(image.convert("RGB").resize((self.size, self.size), self.resampling))


@dataclass(frozen=True)
class Gemma3nImages(Gemma3Images):
    """With what is taken from channels in 0..1, and by what they are divided then."""

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    deviation: tuple[float, ...] = (1.0, 1.0, 1.0)

    @classmethod
    def from_hf(cls, config: dict[str, Any], num_tokens: int) -> Gemma3nImages:
        """Read an image processor's configuration, SigLIP's; what is absent has transformers' default.

        Raises:
            ValueError, TypeError, KeyError: malformed, or something that is not computed.
        """
        size = config.get("size") or {"height": 768, "width": 768}
        if size["height"] != size["width"] or int(size["height"]) ** 2 % (256 * num_tokens):
            raise ValueError(f"an image of {size} pixels for {num_tokens} tokens is not supported")
        if not config.get("do_resize", True) or not config.get("do_rescale", True):
            raise ValueError("images that are not resized or not rescaled are not supported")
        made = cls(int(size["height"]), Image.Resampling(int(config.get("resample", Image.Resampling.BICUBIC))))
        if not config.get("do_normalize", True):
            return made
        mean, deviation = (tuple(config.get(f"image_{name}") or (0.5,) * 3) for name in ("mean", "std"))
        return replace(made, mean=mean, deviation=deviation)


@dataclass(frozen=True)
class Gemma4Images:
    """`pooling` patches along each side of a square become one soft token."""

    patch_size: int = 16
    pooling: int = 3
    max_soft_tokens: int = 280

    def resized(self, image: Image.Image) -> Pixels:
        """(height, width, 3) as `target_size` says."""
        height, width = self.target_size(image.height, image.width)
        image = image.convert("RGB")
        if (height, width) != (image.height, image.width):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)

    def grid(self, pixels: Pixels) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size

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
