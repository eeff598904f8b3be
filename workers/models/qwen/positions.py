"""Positions on three axes: text moves on all of them alike, an image spreads over height and width."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared.messages import MediaItem


def axial_positions(
    num_tokens: int, media: Sequence[MediaItem], merge_size: int, temporal_scale: float = 0.0
) -> np.ndarray:
    """(3, num_tokens) int32: time, height and width of each token of a prompt.

    Args:
        media: in order; `grid` is (t, rows, columns) in patches.
        temporal_scale: position steps per second between a video's frames; 0: one step each.
    Source: transformers' `get_rope_index` of the Qwen-VL models.
    """
    positions = np.zeros((3, num_tokens), dtype=np.int32)
    at = 0  # next token
    current = 0  # next position
    for item in media:
        positions[:, at : item.start] = np.arange(item.start - at) + current
        current += item.start - at
        t, rows, columns = item.grid[0], item.grid[1] // merge_size, item.grid[2] // merge_size
        step = temporal_scale * item.seconds_per_grid if item.kind == "video" and temporal_scale else 1.0
        frames = (np.arange(t) * step).astype(np.int32)
        axes = np.meshgrid(frames, np.arange(rows), np.arange(columns), indexing="ij")
        at = item.start + item.num_tokens
        positions[:, item.start : at] = np.stack(axes).reshape(3, -1) + current
        current += max(rows, columns)
    positions[:, at:] = np.arange(num_tokens - at) + current
    return positions
