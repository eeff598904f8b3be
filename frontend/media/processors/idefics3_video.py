"""Which frames of a video SmolVLM looks at, and what its prompt says before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.qwen_video import MAX_PIXELS
from frontend.media.video import Plan, Source

SKIPPED_S = 1  # at both ends of a long video
DEFAULT_EDGE = 4 * 364
_UNITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
MAX_FRAMES = 999  # that can be written out


@dataclass(frozen=True, kw_only=True)
class FrameRules:
    """As transformers' video processor of the family has them, but `MAX_PIXELS`.

    Args:
        fps: frames looked at in a second.
        max_frames: of one video.
        longest_edge: of a frame before it becomes a square.
    """

    fps: float
    max_frames: int
    longest_edge: int
    resampling: Image.Resampling

    def plan(self, source: Source, tile_edge: int, size: tuple[int, int]) -> Plan:
        """Frames, resized to `size` and then to a tile.

        Source: `sample_frames` of transformers' SmolVLM video processor.
        """
        seconds = source.num_frames / source.fps
        most = min(self.max_frames, MAX_PIXELS // tile_edge**2)
        wanted = max(1, min(round(self.fps * seconds), most))
        first, last = 0, source.num_frames - 1
        if seconds - 2 * SKIPPED_S > self.max_frames * self.fps:
            skipped = SKIPPED_S * source.fps
            first, last = int(skipped), min(int(source.num_frames - skipped), last)
        if first >= last:
            first, last = 0, source.num_frames - 1
        indices = np.unique(np.linspace(first, last, wanted, dtype=int)).tolist()
        return Plan(indices, tile_edge, tile_edge, before=size, resampling=self.resampling)


def frame_leads(indices: Sequence[int], source: Source, before: str, behind: str) -> list[str]:
    """What the prompt says before each frame.

    Args:
        before, behind: what surrounds a frame wherever it stands; the last one's `behind` is left to the caller.
    """
    duration = timedelta(seconds=int(source.num_frames / source.fps))
    intro = (
        f"You are provided the following series of {in_words(len(indices))} frames from a {duration} [H:MM:SS] video.\n"
    )
    times = [index / source.fps for index in indices]
    return [
        f"{behind if i else intro}\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{before}"
        for i, time in enumerate(times)
    ]


def in_words(number: int) -> str:
    """0 <= number <= 999 in English."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    return f"{_UNITS[number // 100]} hundred" + (f" and {in_words(number % 100)}" if number % 100 else "")


def rules_of(settings: dict[str, Any]) -> FrameRules | None:
    """From the settings of the video processor; None where they do not say which frames are looked at.

    Raises KeyError and such where they are malformed.
    """
    sampling = settings.get("video_sampling") or {}
    fps = sampling.get("fps", settings.get("fps"))
    max_frames = sampling.get("max_frames", settings.get("num_frames"))
    if fps is None or max_frames is None:
        return None
    # transformers puts an image processor's `size`, where both share a file, before what is meant for videos.
    size = settings.get("size") or sampling.get("video_size") or {"longest_edge": DEFAULT_EDGE}
    made = FrameRules(
        fps=float(fps),
        max_frames=int(max_frames),
        longest_edge=int(size["longest_edge"]),
        resampling=Image.Resampling(int(settings.get("resample", Image.Resampling.LANCZOS))),
    )
    if made.fps <= 0 or not 0 < made.max_frames <= MAX_FRAMES:
        raise ValueError(f"{max_frames} frames of a video, {fps} a second, are not supported")
    return made
