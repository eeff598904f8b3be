"""Requests with images that become several items, for a template that knows parts only: what reaches the engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from frontend.media.loader import Loaded, MediaLoader, make_item
from frontend.media.parts import MediaPart
from frontend.media.processors import idefics3
from shared.config import Settings
from shared.errors import InvalidRequest
from shared.messages import Submit
from tests.frontend.conftest import RunningServer, byte_text
from tests.frontend.test_media import ask, encoded, part, picture
from tests.frontend.test_media_video import PAD, PROCESSOR, VIDEO, clip
from tests.support.clips import moving, written
from tests.support.fake_engine import FakeEngine, says
from tests.support.tiled_text import IMAGE, TEMPLATE, TOKENIZERS

TOKENIZER = TOKENIZERS["smolvlm"]
CONFIG = {"model_type": "smolvlm", "image_token_id": IMAGE, "vision_config": {"patch_size": 4, "image_size": 16}}
SETTINGS = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
VIDEOS = {"video_sampling": {"fps": 1, "max_frames": 3, "video_size": {"longest_edge": 16}}}
TILE = "<image>" * 4
WHOLE = f"<fake_token_around_image><global-img>{TILE}<fake_token_around_image>"
# Of 40 x 13 pixels: two tiles in one row, and the whole.
TILED = "".join(f"<fake_token_around_image><row_1_col_{i}>{TILE}" for i in (1, 2)) + f"\n\n{WHOLE}"


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text).ids
    return found


@pytest.fixture
def start(
    engine: FakeEngine, start_server: Callable[..., RunningServer], settings: Settings
) -> Callable[..., RunningServer]:
    def started(**more: object) -> RunningServer:
        processor = idefics3.from_configs(CONFIG, {**SETTINGS, **more})
        assert processor is not None
        text = byte_text(tokenizer=TOKENIZER, chat_template=TEMPLATE, eos_token_ids=[ids("<end_of_utterance>")[0]])
        running = start_server(text, media=MediaLoader(processor, settings))
        running.wait_status("/health", 200)
        engine.on_submit = says(ids("ok"))
        return running

    return started


def last_submit(engine: FakeEngine) -> Submit:
    return [message for message in engine.received if isinstance(message, Submit)][-1]


def test_tiles_reach_the_engine_in_their_places(start: Callable[..., RunningServer], engine: FakeEngine) -> None:
    wide = picture(40, 13)
    content = [part(encoded(wide)), {"type": "text", "text": " and "}, part(encoded(picture(40, 13, 1)))]
    assert ask(start(), content).status_code == 200
    submit = last_submit(engine)
    assert submit.prompt_token_ids == ids(f"<|start|>User:{TILED} and {TILED}<end_of_utterance>\nAssistant:")
    assert [(m.kind, m.num_tokens, m.grid) for m in submit.media] == [("image", 4, [1, 4, 4])] * 6
    assert all(submit.prompt_token_ids[m.start : m.start + 4] == [IMAGE] * 4 for m in submit.media)
    assert len({m.content_hash for m in submit.media}) == 6
    tensors = {t.name: t for t in submit.media[1].tensors}
    right = np.frombuffer(tensors["pixels"].data, np.uint8).reshape(tensors["pixels"].shape)
    resized = wide.resize((32, 10), Image.Resampling.LANCZOS).resize((32, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(right, np.asarray(resized)[:, 16:])


def test_texts_of_a_conversation_are_not_lost(start: Callable[..., RunningServer], engine: FakeEngine) -> None:
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": [part(encoded(picture(40, 13))), {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Its"}, {"type": "text", "text": "colour?"}]},
    ]
    answer = start().http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})
    assert answer.status_code == 200
    end = "<end_of_utterance>\n"
    wanted = (
        f"<|start|>System: Short.{end}User:{TILED}What?{end}Assistant: A cat.{end}User: Its\ncolour?{end}Assistant:"
    )
    assert last_submit(engine).prompt_token_ids == ids(wanted)


def test_frames_of_a_video_reach_the_engine_behind_their_times(
    start: Callable[..., RunningServer], engine: FakeEngine
) -> None:
    server = start(**VIDEOS)
    assert server.http.get("/health").json()["input_modalities"] == ["text", "image", "video"]
    content = [clip(written(moving(20), fps=10)), {"type": "text", "text": "What?"}, part(encoded(picture(40, 13)))]
    assert ask(server, content).status_code == 200
    submit = last_submit(engine)
    intro = "You are provided the following series of two frames from a 0:00:02 [H:MM:SS] video.\n"
    video = f"{intro}\nFrame from 00:00:{WHOLE}\nFrame from 00:01:{WHOLE}\n\n"
    assert submit.prompt_token_ids == ids(f"<|start|>User: {video}What?{TILED}<end_of_utterance>\nAssistant:")
    assert [m.kind for m in submit.media] == ["video"] * 2 + ["image"] * 3
    assert ask(server, content[:2]).status_code == 200
    wanted = ids(f"<|start|>User: {video}What?<end_of_utterance>\nAssistant:")
    assert last_submit(engine).prompt_token_ids == wanted, "no line end between a video and a text"


def test_a_video_for_a_checkpoint_without_settings_for_it_is_a_400(start: Callable[..., RunningServer]) -> None:
    answer = ask(start(), [clip(written(moving(4)))])
    assert answer.status_code == 400
    assert "video input is not supported for this model" in answer.json()["error"]["message"]


def test_a_placeholder_written_as_text_is_a_400(start: Callable[..., RunningServer]) -> None:
    answer = ask(start(), [{"type": "text", "text": "an <image>"}, part(encoded(picture(40, 13)))])
    assert answer.status_code == 400
    assert "2 places for 1 images and videos" in answer.json()["error"]["message"]


def test_a_placeholder_of_another_kind_is_a_400(settings: Settings) -> None:
    """Where kinds have placeholders of their own."""
    item = make_item(MediaPart(kind="image", param="p"), PROCESSOR.image(picture(8, 8)))
    loader = MediaLoader(PROCESSOR, settings)
    assert loader.place([PAD], Loaded([item], []))[1]
    with pytest.raises(InvalidRequest, match="placeholder without an image"):
        loader.place([VIDEO], Loaded([item], []))
