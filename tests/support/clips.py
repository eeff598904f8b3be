"""Small videos for tests."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import av
import numpy as np


def moving(num_frames: int, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """(num_frames, height, width, 3): a bright block that wanders over a coloured ground, another one for each seed."""
    rng = np.random.default_rng(seed)
    frames = np.full((num_frames, height, width, 3), rng.integers(0, 100, 3), dtype=np.uint8)
    for i in range(num_frames):
        x, y = (i * 3 + seed * 5) % (width - 15), (i * 2) % (height - 15)
        frames[i, y : y + 16, x : x + 16] = 255 - 3 * (i % 40)
    return frames


def written(frames: np.ndarray, fps: int = 10, form: str = "mp4", codec: str = "libx264", **options: str) -> bytes:
    """The frames as a file's bytes."""
    with tempfile.NamedTemporaryFile() as file:  # some options write a file twice
        _write(file.name, frames, fps, form, codec, options)
        return Path(file.name).read_bytes()


def _write(path: str, frames: np.ndarray, fps: int, form: str, codec: str, options: dict[str, str]) -> None:
    with av.open(path, "w", format=form, options=options) as box:
        video: Any = box.add_stream(codec, rate=fps)
        video.width, video.height = frames.shape[2], frames.shape[1]
        video.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        for frame in frames:
            box.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(video.encode())


def silence() -> bytes:
    """A file with sound and no picture."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as box:
        sound: Any = box.add_stream("aac", rate=16_000)
        for _ in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 16_000
            box.mux(sound.encode(frame))
        box.mux(sound.encode())
    return stream.getvalue()
