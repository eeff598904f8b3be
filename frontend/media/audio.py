"""Bytes of an audio file to mono samples at the rate that a model wants.

What the bytes are is found from the bytes: clients label files wrongly, and a label decides nothing. libsndfile reads
wav, flac, ogg and mp3; FFmpeg's libraries (PyAV) read what it does not know, m4a first of all. Nothing here trusts a
header: decoding stops at the limit, whatever length was announced.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from frontend.media.parts import AUDIO_FORMATS
from shared.errors import InvalidRequest

MIN_RATE, MAX_RATE, MAX_CHANNELS = 4_000, 384_000, 32
BLOCK = 1 << 16  # frames decoded at a time

Samples = NDArray[np.float32]


def decode(content: bytes, rate: int, max_s: float, param: str) -> Samples:
    """(n,) mono samples at `rate` Hz, channels averaged.

    Raises:
        InvalidRequest: no audio that can be read, longer than `max_s`, empty, or with samples that are no numbers.
    """
    if not content:
        raise InvalidRequest("the audio is empty", param=param)
    try:
        samples, own_rate = _by_sndfile(content, max_s, param)
    except soundfile.LibsndfileError:
        samples, own_rate = _by_ffmpeg(content, max_s, param)
    if samples.size == 0:
        raise InvalidRequest("the audio holds no samples", param=param)
    if not np.isfinite(samples).all():
        raise InvalidRequest("the audio holds samples that are not numbers", param=param)
    return samples if own_rate == rate else _resampled(samples, own_rate, rate)


def _resampled(samples: Samples, own_rate: int, rate: int) -> Samples:
    """As librosa.resample does, whose import alone takes seconds: soxr's high quality, and the rounded-up length."""
    resampled: Samples = soxr.resample(samples, own_rate, rate, quality="HQ")
    length = math.ceil(len(samples) * rate / own_rate)
    return np.pad(resampled, (0, max(0, length - len(resampled))))[:length].astype(np.float32)


def _by_sndfile(content: bytes, max_s: float, param: str) -> tuple[Samples, int]:
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        _check_stream(file.samplerate, file.channels, param)
        blocks = file.blocks(BLOCK, dtype="float32", always_2d=True)
        mono = (_mean(block, axis=1) for block in blocks)
        return _joined(mono, file.samplerate, max_s, param), file.samplerate


def _by_ffmpeg(content: bytes, max_s: float, param: str) -> tuple[Samples, int]:
    import av

    try:
        # Files only: a playlist in the bytes must not make FFmpeg open addresses or paths.
        with av.open(
            io.BytesIO(content), "r", options={"protocol_whitelist": "", "format_whitelist": _CONTAINERS}
        ) as box:
            if not box.streams.audio:
                raise InvalidRequest("the file holds no audio", param=param)
            stream = box.streams.audio[0]
            if stream.codec_context is None:  # a codec that these libraries lack: PyAV gives such a stream no rate
                raise ValueError("no decoder")
            own_rate = int(stream.rate or 0)
            _check_stream(own_rate, stream.channels, param)
            planar = av.AudioResampler(format="fltp", rate=own_rate)
            mono = (_mean(part.to_ndarray(), axis=0) for frame in box.decode(stream) for part in planar.resample(frame))
            return _joined(mono, own_rate, max_s, param), own_rate
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise InvalidRequest(f"the audio cannot be read as any of {', '.join(AUDIO_FORMATS)}", param=param) from error


_CONTAINERS = "mov,mp4,m4a,aac,mp3,wav,flac,ogg,matroska,webm"


def _mean(samples: NDArray[Any], axis: int) -> Samples:
    """Infinities and what is no number are found in the result."""
    with np.errstate(all="ignore"):
        mono: Samples = samples.mean(axis=axis, dtype=np.float32)
    return mono


def _check_stream(rate: int, channels: int, param: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise InvalidRequest(f"a sampling rate of {rate} Hz is not in {MIN_RATE} .. {MAX_RATE}", param=param)
    if not 1 <= channels <= MAX_CHANNELS:
        raise InvalidRequest(f"{channels} channels are not in 1 .. {MAX_CHANNELS}", param=param)


def _joined(blocks: Iterator[Samples], rate: int, max_s: float, param: str) -> Samples:
    kept: list[Samples] = []
    count = 0
    for block in blocks:
        kept.append(block)
        count += len(block)
        if count > max_s * rate:
            raise InvalidRequest(f"the audio is longer than the {max_s:g} s that the model takes", param=param)
    return np.concatenate(kept) if kept else np.zeros((0,), np.float32)
