"""Videos in chat requests: which frames are looked at, what reaches the engine, what a bad file is answered with."""

from __future__ import annotations

import ast
import importlib
import io
import math
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import msgspec
import numpy as np
import pytest
from PIL import Image

from frontend.media import video as reading
from frontend.media.loader import MediaLoader
from frontend.media.processors import processor_of
from frontend.media.processors.qwen import QwenProcessor
from frontend.media.processors.qwen_video import VideoRules, times
from frontend.media.video import Plan, Source, decode_video
from shared.config import Settings
from shared.errors import InvalidRequest
from shared.messages import Submit
from tests.frontend.conftest import RunningServer, byte_text, ids
from tests.frontend.test_media import ask, part, picture, uri
from tests.frontend.test_media import encoded as png
from tests.support.clips import moving, silence, written
from tests.support.fake_engine import FakeEngine, says

PAD, VIDEO = 0, 2  # <|endoftext|> and <|im_end|> play the placeholders
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<|endoftext|>{% elif p['type'] == 'video' %}<|im_end|>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
RULES = VideoRules(is_timed=False, fps=2.0, min_frames=4, max_frames=8, min_pixels=64, max_pixels=16 * 24)
PROCESSOR = QwenProcessor(
    patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096, mean=(0.5,) * 3, std=(0.5,) * 3,
    image_token_id=PAD, video_token_id=VIDEO, video_rules=RULES,
)  # fmt: skip
TIMED = replace(PROCESSOR, video_rules=replace(RULES, is_timed=True, max_pixels=4 * 16 * 24))


def clip(data: bytes) -> dict[str, object]:
    return {"type": "video_url", "video_url": {"url": uri(data, "video/mp4")}}


@pytest.fixture
def video_server(engine: FakeEngine, start_server: Callable[..., RunningServer], settings: Settings) -> RunningServer:
    running = start_server(byte_text(chat_template=TEMPLATE), media=MediaLoader(PROCESSOR, settings))
    running.wait_status("/health", 200)
    engine.on_submit = says(ids("ok"))
    return running


def last_submit(engine: FakeEngine) -> Submit:
    return [message for message in engine.received if isinstance(message, Submit)][-1]


def test_the_chosen_frames_are_those_of_the_file() -> None:
    data = written(moving(12), fps=10)
    frames, source, indices = decode_video(data, "v", lambda source: Plan([0, 5, 11], source.height, source.width))
    assert source == Source(num_frames=12, fps=10.0, height=48, width=64)
    with av.open(io.BytesIO(data)) as box:
        decoded = [frame.to_ndarray(format="rgb24") for frame in box.decode(video=0)]
    assert indices == [0, 5, 11]
    np.testing.assert_array_equal(frames, np.stack([decoded[i] for i in indices]))
    small, _, _ = decode_video(data, "v", lambda _: Plan([5], 16, 24))
    wanted = Image.fromarray(decoded[5]).resize((24, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(small[0], np.asarray(wanted))


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
def test_other_containers_are_read(form: str, codec: str) -> None:
    frames, source, _ = decode_video(written(moving(8), 8, form, codec), "v", lambda _: Plan([0, 7], 16, 16))
    assert (source.num_frames, round(source.fps), frames.shape) == (8, 8, (2, 16, 16, 3))


def test_a_video_that_was_held_upright_is_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(moving(4))
    plain, _, _ = decode_video(data, "v", lambda source: Plan([0], source.height, source.width))
    original = reading.Frame.__init__

    def turned(self: reading.Frame, frame: object) -> None:
        original(self, types.SimpleNamespace(rotation=-90, height=48, width=64, to_image=frame.to_image))  # type: ignore[attr-defined]

    monkeypatch.setattr(reading.Frame, "__init__", turned)
    upright, source, _ = decode_video(data, "v", lambda source: Plan([0], source.height, source.width))
    assert (source.height, source.width) == (64, 48)
    np.testing.assert_array_equal(upright[0], np.rot90(plain[0], -1))


def test_a_video_reaches_the_engine_as_one_item_with_its_speed(video_server: RunningServer, engine: FakeEngine) -> None:
    content = [{"type": "text", "text": "See "}, clip(written(moving(30), fps=10)), {"type": "text", "text": " well"}]
    assert ask(video_server, content).status_code == 200
    submit = last_submit(engine)
    (item,) = submit.media
    assert (item.kind, item.grid, item.num_tokens) == ("video", [3, 4, 4], 12)  # 3 s, 2 frames a second: 6 of 16 x 16
    assert item.seconds_per_grid == pytest.approx(1.0)
    assert submit.prompt_token_ids == [*ids("See "), *[VIDEO] * 12, *ids(" well")]
    assert item.start == 4
    frames = next(t for t in item.tensors if t.name == "frames")
    assert frames.shape == [6, 16, 16, 3]


def test_speed_and_pixels_tell_videos_apart_and_nothing_else_does(
    video_server: RunningServer, engine: FakeEngine
) -> None:
    def content_hash(data: bytes) -> bytes:
        assert ask(video_server, [clip(data)]).status_code == 200
        return last_submit(engine).media[0].content_hash

    frames = moving(8)
    data = written(frames, fps=2)  # once: the encoder's threads may decide otherwise the next time
    first = content_hash(data)
    assert content_hash(data) == first
    assert content_hash(written(frames, fps=1)) != first  # the same frames, another time between them
    assert content_hash(written(moving(8, seed=1), fps=2)) != first


def test_images_and_videos_keep_their_places(video_server: RunningServer, engine: FakeEngine) -> None:
    content = [part(png(picture())), clip(written(moving(8), fps=4)), part(png(picture(seed=1)))]
    assert ask(video_server, content).status_code == 200
    assert [item.kind for item in last_submit(engine).media] == ["image", "video", "image"]


def test_newer_models_see_pairs_of_frames_behind_their_times() -> None:
    parts = TIMED.video(written(moving(31), fps=10), "v")
    assert [p.lead for p in parts] == ["<0.3 seconds>", "<1.5 seconds>", "<2.7 seconds>"]
    assert {tuple(p.grid) for p in parts} == {(1, 2, 4)} and {p.num_tokens for p in parts} == {2}
    assert [p.arrays["frames"].shape for p in parts] == [(2, 8, 16, 3)] * 3
    one = "<|vision_start|><|video_pad|><|vision_end|>"
    prompt = TIMED.rewrite(f"A{one}B{one}C", [["<1>", "<2>"], ["<3>"]])
    assert prompt == f"A<1>{one}<2>{one}B<3>{one}C"
    assert PROCESSOR.rewrite(f"A{one}", [[""]]) == f"A{one}"  # older ones see the video as a whole


def reference(name: str, *functions: str) -> list[Callable[..., Any]]:
    """Functions of transformers' video processor, out of its source: importing it needs torchvision, they do not."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = Path(transformers.__file__).parent / f"models/{name}/video_processing_{name}.py"
    wanted = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name in functions
    ]
    found: dict[str, Any] = {"math": math, "np": np, "torch": torch}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *wanted], []), str(path), "exec"), found)
    return [found[function] for function in functions]


SOURCES = [
    Source(num_frames, fps, height, width)
    for num_frames, fps in ((1, 25.0), (3, 30.0), (7, 24.0), (100, 29.97), (1001, 60.0), (300, 1.0))
    for height, width in ((480, 640), (1080, 1920), (20, 90), (333, 333))
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.num_frames}x{s.width}x{s.height}")
def test_frames_and_sizes_of_newer_models_are_those_of_transformers(source: Source) -> None:
    sample_frames, smart_resize = reference("qwen3_vl", "sample_frames", "smart_resize")
    rules = VideoRules(is_timed=True, fps=2, min_frames=4, max_frames=768, min_pixels=4096, max_pixels=4_000_000)
    plan = rules.plan(source, 32, 2)
    them = types.SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    told = types.SimpleNamespace(total_num_frames=source.num_frames, fps=source.fps)
    wanted = sample_frames(them, told)
    assert list(plan.indices) == wanted.tolist()
    size = smart_resize(max(len(wanted), 2), source.height, source.width, 2, 32, 4096, 4_000_000)
    assert (plan.height, plan.width) == size
    processing = importlib.import_module("transformers.models.qwen3_vl.processing_qwen3_vl")
    stamps = processing.Qwen3VLProcessor._calculate_timestamps(None, list(plan.indices), source.fps, 2)
    assert times(plan.indices, source.fps, 2) == [f"<{stamp:.1f} seconds>" for stamp in stamps]


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.num_frames}x{s.width}x{s.height}")
def test_frames_and_sizes_of_older_models_are_those_of_transformers(source: Source) -> None:
    sample_frames, smart_resize = reference("qwen2_vl", "sample_frames", "smart_resize")
    rules = VideoRules(
        is_timed=False, fps=2, min_frames=4, max_frames=40, min_pixels=128 * 28 * 28, max_pixels=200 * 28 * 28
    )
    plan = rules.plan(source, 28, 2)
    if source.num_frames > 1:  # of one frame transformers makes none
        them = types.SimpleNamespace(fps=2, min_frames=4, max_frames=40, num_frames=None, temporal_patch_size=2)
        told = types.SimpleNamespace(total_num_frames=source.num_frames, fps=source.fps)
        assert list(plan.indices) == sample_frames(them, told).tolist()
    size = smart_resize(source.height, source.width, 28, 128 * 28 * 28, 200 * 28 * 28)
    assert (plan.height, plan.width) == size


def test_a_long_video_stays_within_what_a_request_may_send() -> None:
    for is_timed in (True, False):
        own = {"video_processor": {"size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 10**9}}}
        plan = VideoRules.of(own, 14, is_timed).plan(Source(30_000, 30.0, 2160, 3840), 28, 2)
        assert len(plan.indices) * plan.height * plan.width <= 12_600_000
        assert len(plan.indices) >= 100


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "has no bytes"),
        (bytes(range(256)) * 40, "cannot be read as any of mp4"),
        (silence(), "holds no video"),
        (written(moving(40), movflags="faststart")[:-900], "cut short"),
        (written(moving(40))[:2000], "cannot be read as any of mp4"),
        (written(moving(4, width=4000, height=16)), "ratios up to 200"),
        (png(picture()), "cannot be read as any of mp4"),
    ],
    ids=["empty", "noise", "sound", "cut at its end", "cut at its head", "a line", "an image"],
)
def test_a_bad_video_is_a_400_that_says_why(data: bytes, told: str, video_server: RunningServer) -> None:
    answer = ask(video_server, [{"type": "text", "text": "a"}, clip(data)])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert told in error["message"] and error["param"] == "messages[0].content[1].video_url.url"
    assert ask(video_server, "still there").status_code == 200


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("MAX_FRAMES", 10, "more than 10 frames"),
        ("MAX_FRAME_PIXELS", 1000, "frames of 64 x 48 pixels"),
        ("MAX_DECODED_PIXELS", 64 * 48 * 5, "send a shorter or smaller one"),
    ],
)
def test_limits_are_told(limit: str, value: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(moving(20), fps=2)
    monkeypatch.setattr(reading, limit, value)
    with pytest.raises(InvalidRequest, match=told):
        PROCESSOR.video(data, "v")


def test_a_model_for_images_takes_no_video(
    start_server: Callable[..., RunningServer], engine: FakeEngine, settings: Settings
) -> None:
    only_images = replace(PROCESSOR, video_rules=None)
    running = start_server(byte_text(chat_template=TEMPLATE), media=MediaLoader(only_images, settings))
    running.wait_status("/health", 200)
    answer = ask(running, [clip(written(moving(4)))])
    assert answer.status_code == 400
    assert "video input is not supported for this model" in answer.json()["error"]["message"]


def test_settings_of_a_checkpoint_are_read(tmp_path) -> None:  # type: ignore[no-untyped-def] # a Path
    config = {
        "model_type": "qwen3_vl", "vision_config": {"patch_size": 16}, "image_token_id": 1, "video_token_id": 2
    }  # fmt: skip
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config))
    own = {"fps": 1, "max_frames": 100, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    (tmp_path / "video_preprocessor_config.json").write_bytes(msgspec.json.encode(own))
    processor = processor_of(tmp_path)
    assert isinstance(processor, QwenProcessor)
    assert processor.video_rules == VideoRules(
        is_timed=True, fps=1.0, min_frames=4, max_frames=100, min_pixels=4096, max_pixels=25165824
    )
    assert processor.modalities == ("image", "video")
