"""Mutated images, videos and audio files: read, or refused with a clear 400; never another exception, never a hang."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from frontend.media import audio
from frontend.media.decode import decode_image
from frontend.media.processors.qwen_video import VideoRules
from frontend.media.video import decode_video
from shared.errors import InvalidRequest
from tests.frontend.media.test_audio import LOSSLESS, LOSSY, RATE
from tests.fuzz.scale import SEED, count
from tests.fuzz.test_model_files import damaged
from tests.support.clips import moving, written

MAX_S = 30.0
HEAD_BYTES = 200  # where most of what a decoder believes stands
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def images() -> dict[str, bytes]:
    pixels = np.random.default_rng(SEED).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    files = {}
    for kind in FORMATS:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        files[kind] = stream.getvalue()
    return files


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Damage in one to three places, half of it in the head; now and then cut off."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(len(content), HEAD_BYTES) if rng.random() < 0.5 else len(content))
        content = content[:at] + damaged(content[at : at + 16], rng) + content[at + 16 :]
    return content[: rng.randrange(1, len(content))] if rng.random() < 0.1 else content


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about metadata; they go to the log
def test_a_mutated_image_is_read_or_refused() -> None:
    rng, num_refused = random.Random(SEED), 0
    files = images()
    for number in range(count(200, 2000)):
        content = mutated(files[FORMATS[number % len(FORMATS)]], rng)
        try:
            assert decode_image(content, "image").width > 0
        except InvalidRequest:
            num_refused += 1
    assert count(20, 200) < num_refused < count(200, 2000), "both happen"


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("gif", "gif")]
)
def test_a_mutated_video_is_read_or_refused(form: str, codec: str) -> None:
    rng, num_refused = random.Random(SEED), 0
    whole = written(moving(12), 6, form, codec)
    rules = VideoRules(is_timed=True, fps=2, min_frames=4, max_frames=8, min_pixels=64, max_pixels=4096)
    for _ in range(count(60, 2000)):
        try:
            frames, source, indices = decode_video(mutated(whole, rng), "video", lambda s: rules.plan(s, 8, 2))
            assert frames.dtype == np.uint8 and len(frames) == len(indices) > 0 and source.num_frames > 0
        except InvalidRequest:
            num_refused += 1
    assert num_refused > 0


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
def test_a_mutated_clip_is_read_or_refused(name: str) -> None:
    rng, num_refused = random.Random(SEED), 0
    for _ in range(count(60, 400)):
        try:
            samples = audio.decode(mutated((LOSSLESS | LOSSY)[name], rng), RATE, MAX_S, "audio")
            assert samples.dtype == np.float32 and 0 < samples.shape[0] <= MAX_S * RATE
        except InvalidRequest:
            num_refused += 1
    assert num_refused > 0
