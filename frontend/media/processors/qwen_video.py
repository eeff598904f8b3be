"""Which frames of a video a Qwen model looks at, how large they are, and what its prompt says before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frontend.media.processors.areas import check_ratio, fitting_size
from frontend.media.video import Plan, Source

MAX_PIXELS = 12_000_000  # of all frames that are looked at: 36 MB of a request's 48
LEAST_SHARE = 1.05  # of the smallest area, which a frame may have whatever the budget
PLACEHOLDER = "<|video_pad|>"
PART = f"<|vision_start|>{PLACEHOLDER}<|vision_end|>"


@dataclass(frozen=True, kw_only=True)
class VideoRules:
    """As transformers' video processors of the family have them, but `MAX_PIXELS`.

    Args:
        is_timed: newer models: areas are of all frames together, and each pair of frames has its time in the prompt.
        fps: frames looked at in a second.
        min_pixels, max_pixels: area of a frame, or of all together where `is_timed`.
    """

    is_timed: bool
    fps: float
    min_frames: int
    max_frames: int
    min_pixels: int
    max_pixels: int

    @classmethod
    def of(cls, settings: dict[str, Any], patch_size: int, is_timed: bool) -> VideoRules:
        """From the `video_processor` of a checkpoint's settings, if there is one.

        Raises KeyError and such where it is malformed.
        """
        own = settings.get("video_processor") or {}
        size = own.get("size") or {}
        block = (2 * patch_size) ** 2
        return cls(
            is_timed=is_timed,
            fps=float(own.get("fps") or 2.0),
            min_frames=int(own.get("min_frames") or 4),
            max_frames=int(own.get("max_frames") or 768),
            min_pixels=int(own.get("min_pixels") or size.get("shortest_edge") or 128 * block),
            max_pixels=int(own.get("max_pixels") or size.get("longest_edge") or 768 * block),
        )

    def plan(self, source: Source, factor: int, pair: int) -> Plan:
        """Frames and their size.

        Args:
            factor: pixels of a block of patches, `pair`: frames of one patch.
        Raises:
            InvalidRequest: the video is more than 200 times as long as wide.
        Source: `sample_frames` of transformers' Qwen2-VL and Qwen3-VL video processors.
        """
        least = factor**2 if self.is_timed else int(LEAST_SHARE * self.min_pixels)
        most = min(self.max_frames, MAX_PIXELS // least, source.num_frames)
        wanted = source.num_frames / source.fps * self.fps
        num_frames = max(1, int(min(max(wanted, self.min_frames), most)))
        if self.is_timed:
            indices = np.linspace(0, source.num_frames - 1, num_frames).round().astype(int).tolist()
            return Plan(indices, *self._size_together(max(num_frames, pair), source.height, source.width, factor, pair))
        num_frames = max(1, num_frames // pair * pair)
        indices = (np.arange(num_frames) * (source.num_frames / num_frames)).astype(int).tolist()
        largest = max(min(self.max_pixels, MAX_PIXELS // num_frames), least)
        return Plan(indices, *fitting_size(source.height, source.width, factor, self.min_pixels, largest))

    def _size_together(self, num_frames: int, height: int, width: int, factor: int, pair: int) -> tuple[int, int]:
        """Multiples of `factor` for which all frames lie in the range. Source: `smart_resize` of Qwen3-VL's videos."""
        if min(height, width) < factor:
            scale = factor / min(height, width)
            height, width = int(height * scale), int(width * scale)
        check_ratio(height, width)
        most = min(self.max_pixels, MAX_PIXELS)
        new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
        area = round(num_frames / pair) * pair * new_height * new_width
        if area > most:
            shrink = math.sqrt(num_frames * height * width / most)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
        elif area < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (num_frames * height * width))
            new_height = math.ceil(height * stretch / factor) * factor
            new_width = math.ceil(width * stretch / factor) * factor
        return new_height, new_width


def times(indices: Sequence[int], fps: float, pair: int) -> list[str]:
    """What stands before each pair of frames: the mean of their times."""
    padded = [*indices, *[indices[-1]] * (-len(indices) % pair)]
    return [f"<{(padded[i] + padded[i + pair - 1]) / 2 / fps:.1f} seconds>" for i in range(0, len(padded), pair)]


def with_times(prompt: str, leads: Sequence[Sequence[str]]) -> str:
    """The prompt with the parts of each video behind their times, in place of the whole video.

    A prompt that does not name each video once is left as it is.
    """
    pieces = prompt.split(PART if prompt.count(PART) == prompt.count(PLACEHOLDER) else PLACEHOLDER)
    if len(pieces) != len(leads) + 1:
        return prompt
    told = ["".join(lead + PART for lead in parts) for parts in leads]
    return "".join(text for both in zip(pieces, [*told, ""], strict=True) for text in both)
