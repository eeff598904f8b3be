"""Qwen-VL's images and videos: resized to whole blocks of patches within a range of areas, 8 bits a channel.

The target scales and cuts them into patches, so that 3 bytes a pixel travel instead of 24. Newer models see each pair
of a video's frames as an item of its own behind its time in the text; the others see the whole video as one item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.areas import fitting_size
from frontend.media.processors.base import Processed, Processor
from frontend.media.processors.qwen_video import VideoRules, times, with_times
from frontend.media.video import decode_video
from shared.messages import MediaKind

NEWER_TYPES = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", *NEWER_TYPES)

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class QwenProcessor(Processor):
    """Args:
    min_pixels, max_pixels: area of a resized image.
    mean, std: of channels in 0..1.
    video_rules: None for a checkpoint that names no token for videos.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token_id: int
    video_token_id: int = -1
    video_rules: VideoRules | None = None

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return ("image", "video") if self.video_rules is not None else ("image",)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        found: dict[MediaKind, int] = {"image": self.image_token_id}
        return found | ({"video": self.video_token_id} if self.video_rules is not None else {})

    def image(self, picture: Image.Image) -> Processed:
        """Raises:
        InvalidRequest: it is more than 200 times as long as wide.
        """
        height, width = fitting_size(picture.height, picture.width, self._factor, self.min_pixels, self.max_pixels)
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        return self._processed(np.asarray(resized, dtype=np.uint8)[None])

    def video(self, data: bytes, param: str) -> list[Processed]:
        """Raises:
        InvalidRequest: it cannot be read, is too large, or more than 200 times as long as wide.
        """
        rules = self.video_rules
        assert rules is not None, "the request's kinds were checked"
        frames, source, indices = decode_video(
            data, param, lambda source: rules.plan(source, self._factor, self.temporal_patch_size)
        )
        pair = self.temporal_patch_size
        if not rules.is_timed:
            seconds = pair * source.num_frames / (len(indices) * source.fps)
            return [replace(self._processed(frames), seconds_per_grid=seconds)]
        return [
            replace(self._processed(frames[i * pair : (i + 1) * pair]), lead=time)
            for i, time in enumerate(times(indices, source.fps, pair))
        ]

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """Newer models: each part of a video behind its time, in place of the whole video."""
        return with_times(prompt, leads) if self.video_rules is not None and self.video_rules.is_timed else prompt

    @property
    def _factor(self) -> int:
        return self.patch_size * self.merge_size

    def _processed(self, frames: np.ndarray) -> Processed:
        """Frames (T, height, width, 3) uint8; the target repeats an odd last one."""
        t = -(-len(frames) // self.temporal_patch_size)
        grid = [t, frames.shape[1] // self.patch_size, frames.shape[2] // self.patch_size]
        arrays: dict[str, np.ndarray] = {
            "frames": np.ascontiguousarray(frames),
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
        }
        return Processed(arrays, grid, grid[0] * grid[1] * grid[2] // self.merge_size**2)


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
        video_token_id=int(config.get("video_token_id") or -1),
        video_rules=VideoRules.of(image_config, patch, is_newer) if config.get("video_token_id") else None,
    )
