"""Sizes in whole blocks of patches, near a picture's own."""

from __future__ import annotations

import math

from shared.errors import InvalidRequest

MAX_ASPECT_RATIO = 200


def check_ratio(height: int, width: int) -> None:
    """Raises InvalidRequest: more than 200 times as long as wide."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequest(f"it is {width} x {height} pixels; this model takes ratios up to {MAX_ASPECT_RATIO}")


def fitting_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of `factor` near the image's own height and width whose area lies in the range.

    Raises:
        InvalidRequest: the image is more than 200 times as long as wide.
    Source: `smart_resize` of transformers' Qwen2-VL image processor.
    """
    check_ratio(height, width)
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * stretch / factor) * factor
        new_width = math.ceil(width * stretch / factor) * factor
    return new_height, new_width
