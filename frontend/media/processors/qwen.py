"""Qwen-VL's images: resized to whole blocks of patches within a range of areas, 8 bits a channel.

The target scales and cuts them into patches, so that 3 bytes a pixel travel instead of 24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.base import Processed, Processor
from shared.errors import InvalidRequest
from shared.messages import MediaKind

NEWER_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", *NEWER_TYPES)
MAX_ASPECT_RATIO = 200

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class QwenProcessor(Processor):
    """Args:
    min_pixels, max_pixels: area of a resized image.
    mean, std: of channels in 0..1.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token_id: int

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return ("image",)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        return {"image": self.image_token_id}

    def image(self, picture: Image.Image) -> Processed:
        """Raises:
        InvalidRequest: it is more than 200 times as long as wide.
        """
        factor = self.patch_size * self.merge_size
        height, width = fitting_size(picture.height, picture.width, factor, self.min_pixels, self.max_pixels)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        frames = np.asarray(resized, dtype=np.uint8)[None]
        grid = [1, height // self.patch_size, width // self.patch_size]
        arrays: dict[str, np.ndarray] = {
            "frames": frames,
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
        }
        return Processed(arrays, grid, grid[1] * grid[2] // self.merge_size**2)


def fitting_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Multiples of `factor` near the image's own height and width whose area lies in the range.

    Raises:
        InvalidRequest: the image is more than 200 times as long as wide.
    Source: `smart_resize` of transformers' Qwen2-VL image processor.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidRequest(f"the image is {width} x {height}; this model takes ratios up to {MAX_ASPECT_RATIO}")
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


def from_configs(config: dict[str, Any], image_config: dict[str, Any]) -> QwenProcessor | None:
    """From config.json and preprocessor_config.json (or none); None for a conversion that has text only.

    Raises KeyError and such where they are malformed.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    is_newer = config["model_type"] in NEWER_TYPES
    size = image_config.get("size") or {}
    patch = int(image_config.get("patch_size") or vision.get("patch_size") or (16 if is_newer else 14))
    least, most = (65_536, 16_777_216) if is_newer else (56 * 56, 28 * 28 * 1280)
    half = (0.5, 0.5, 0.5)
    return QwenProcessor(
        patch_size=patch,
        merge_size=int(image_config.get("merge_size") or vision.get("spatial_merge_size") or 2),
        temporal_patch_size=int(image_config.get("temporal_patch_size") or vision.get("temporal_patch_size") or 2),
        min_pixels=int(image_config.get("min_pixels") or size.get("shortest_edge") or least),
        max_pixels=int(image_config.get("max_pixels") or size.get("longest_edge") or most),
        mean=tuple(float(x) for x in image_config.get("image_mean") or (half if is_newer else _CLIP_MEAN)),
        std=tuple(float(x) for x in image_config.get("image_std") or (half if is_newer else _CLIP_STD)),
        image_token_id=int(config["image_token_id"]),
    )
