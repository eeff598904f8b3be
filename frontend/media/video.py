"""Bytes of a video to the frames that a model looks at, each resized as it is decoded. Runs in a thread.

FFmpeg's libraries (PyAV) read them. Nothing here trusts a header: packets are counted, and what decoding would cost is
refused before it begins.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shared.errors import InvalidRequest

MAX_FRAME_PIXELS = 4096 * 4096
MAX_FRAMES = 40_000  # in the file
MAX_DECODED_PIXELS = 10_000_000_000  # about 80 s of 1080p at 60 frames a second, or six minutes of 720p at 30
DEFAULT_FPS = 24.0  # of a file that does not tell

_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts"
_NAMES = "mp4, mov, mkv, webm, avi, gif"


@dataclass(frozen=True)
class Source:
    """What a file holds, turned upright."""

    num_frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class Plan:
    """Which frames are looked at (ascending; one may be named again) and the size they get.

    `before`: the (height, width) that they get first.
    """

    indices: Sequence[int]
    height: int
    width: int
    before: tuple[int, int] | None = None
    resampling: Image.Resampling = Image.Resampling.BICUBIC


def decode_video(
    data: bytes, param: str, choose: Callable[[Source], Plan]
) -> tuple[NDArray[np.uint8], Source, list[int]]:
    """(frames (T, height, width, 3), what the file holds, the indices of those frames).

    Args:
        choose: what the model wants of a file.
    Raises:
        InvalidRequest: no video that can be read, cut short, without frames, or too large to be decoded.
    """
    import av

    if not data:
        raise InvalidRequest("the video has no bytes", param=param)
    try:
        num_frames = _count(data, param)
        with _open(data) as box:
            stream = _stream(box, param)
            if stream.frames > num_frames + 2:  # some containers tell
                raise InvalidRequest("the video is cut short", param=param)
            pictures = _pictures(box.decode(stream), param)
            first = next(pictures, None)
            if first is None:
                raise InvalidRequest("the video holds no frames", param=param)
            source = Source(num_frames, float(stream.average_rate or DEFAULT_FPS), first.height, first.width)
            plan = choose(source)
            if (plan.indices[-1] + 1) * source.height * source.width > MAX_DECODED_PIXELS:
                size = f"{num_frames} frames of {source.width} x {source.height}"
                raise InvalidRequest(f"the video has {size}: send a shorter or smaller one", param=param)
            return _chosen(first, pictures, plan, param), source, list(plan.indices)
    except (av.FFmpegError, ValueError, IndexError, MemoryError) as error:
        raise InvalidRequest(f"the video cannot be read as any of {_NAMES}", param=param) from error


def _open(data: bytes) -> Any:  # noqa: ANN401 - PyAV's containers
    import av

    # Files only: a playlist in the bytes must not make FFmpeg open addresses or paths.
    return av.open(io.BytesIO(data), "r", options={"protocol_whitelist": "", "format_whitelist": _CONTAINERS})


def _stream(box: Any, param: str) -> Any:  # noqa: ANN401 - PyAV's containers and streams
    if not box.streams.video:
        raise InvalidRequest("the file holds no video", param=param)
    stream = box.streams.video[0]
    if stream.codec_context is None:  # a codec that these libraries lack
        raise ValueError("no decoder")
    if stream.codec_context.width * stream.codec_context.height > MAX_FRAME_PIXELS:
        size = f"{stream.codec_context.width} x {stream.codec_context.height}"
        raise InvalidRequest(f"frames of {size} pixels; {MAX_FRAME_PIXELS} are allowed", param=param)
    return stream


def _count(data: bytes, param: str) -> int:
    """Packets that hold a frame; nothing is decoded."""
    count = 0
    with _open(data) as box:
        for packet in box.demux(_stream(box, param)):
            count += packet.size > 0
            if count > MAX_FRAMES:
                raise InvalidRequest(f"the video has more than {MAX_FRAMES} frames", param=param)
    return count


def _pictures(frames: Iterator[Any], param: str) -> Iterator[Frame]:
    for frame in frames:
        if frame.width * frame.height > MAX_FRAME_PIXELS:
            raise InvalidRequest(f"frames of {frame.width} x {frame.height} pixels are too large", param=param)
        yield Frame(frame)


class Frame:
    """A decoded frame, made a picture only where it is wanted."""

    def __init__(self, frame: Any) -> None:  # noqa: ANN401 - PyAV's frame
        self._frame = frame
        self._turns = round(frame.rotation / 90) % 4  # as phones note it, counter-clockwise
        sizes = frame.height, frame.width
        self.height, self.width = sizes if self._turns % 2 == 0 else sizes[::-1]

    def picture(self, plan: Plan) -> NDArray[np.uint8]:
        """(height, width, 3), upright."""
        image = self._frame.to_image()
        if self._turns:
            image = image.transpose(_TURNS[self._turns])
        if plan.before is not None:
            image = image.resize(plan.before[::-1], plan.resampling)
        return np.asarray(image.resize((plan.width, plan.height), plan.resampling), dtype=np.uint8)


_TURNS = {1: Image.Transpose.ROTATE_90, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_270}


def _chosen(first: Frame, others: Iterator[Frame], plan: Plan, param: str) -> NDArray[np.uint8]:
    """The wanted frames. Some containers count packets that show nothing: the last frame stands for those."""
    found = np.empty((len(plan.indices), plan.height, plan.width, 3), dtype=np.uint8)
    at, number, frame = 0, 0, first
    while at < len(plan.indices):
        if plan.indices[at] == number:
            found[at] = frame.picture(plan)
            at += 1
            continue
        following = next(others, None)
        if following is None:
            break
        number, frame = number + 1, following
    if 2 * at < len(plan.indices):
        raise InvalidRequest("the video is cut short or damaged", param=param)
    found[at:] = found[at - 1]
    return found
