"""Videos of SmolVLM: frames, times and prompts against transformers, and what a request with one gives."""

from __future__ import annotations

import types

import numpy as np
import pytest
from PIL import Image

from frontend.chat_template import ChatTemplate
from frontend.media.loader import Loaded, MediaLoader, make_item
from frontend.media.parts import MediaPart
from frontend.media.processors import idefics3
from frontend.media.processors.idefics3 import scaled_to
from frontend.media.processors.idefics3_video import FrameRules, in_words
from frontend.media.video import Plan, Source, decode_video
from shared.config import Settings
from tests.frontend.test_media_video import reference
from tests.support.clips import moving, written
from tests.support.tiled_text import IMAGE, TEMPLATE, TOKENIZERS
from tests.workers.idefics3 import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CONFIG = {"model_type": "smolvlm", "image_token_id": IMAGE, "vision_config": hf.VISION, "text_config": hf.TEXT}
SAMPLING = {"video_sampling": {"fps": 2, "max_frames": 5, "video_size": {"longest_edge": 24}}}
SOURCES = [
    Source(n, fps, 480, 640)
    for n, fps in ((1, 25.0), (3, 30.0), (7, 24.0), (100, 29.97), (1001, 60.0), (300, 1.0), (2501, 7.5), (115, 10.0))
]


def video_processor(**changes):
    return idefics3.from_configs(CONFIG, {**hf.IMAGES, **SAMPLING, **changes})


@pytest.mark.parametrize(("fps", "max_frames"), [(1.0, 64), (2.0, 5), (0.5, 8), (30.0, 64)])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: f"{s.num_frames} frames, {s.fps} a second")
def test_frames_are_those_of_transformers(transformers, source, fps, max_frames):
    (sample_frames,) = reference("smolvlm", "sample_frames")
    told = transformers.video_utils.VideoMetadata(source.num_frames, source.fps)
    told.duration = source.num_frames / source.fps
    rules = FrameRules(fps=fps, max_frames=max_frames, longest_edge=512, resampling=Image.Resampling.LANCZOS)
    wanted = sample_frames(None, told, num_frames=max_frames, fps=fps)
    assert list(rules.plan(source, 16, (8, 8)).indices) == wanted.tolist()


def test_a_long_video_stays_within_what_a_request_may_send():
    rules = FrameRules(fps=1, max_frames=64, longest_edge=2048, resampling=Image.Resampling.LANCZOS)
    plan = rules.plan(Source(30_000, 30.0, 2160, 3840), 512, (1152, 2048))
    assert len(plan.indices) == 12_000_000 // 512**2
    assert (plan.height, plan.width, plan.before) == (512, 512, (1152, 2048))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (1080, 1920), (20, 91), (333, 333), (640, 7)])
def test_sizes_are_those_of_transformers(height, width):
    (resized,) = reference("smolvlm", "get_resize_output_image_size")
    resized.__globals__["MAX_IMAGE_SIZE"] = 4096
    shaped = types.SimpleNamespace(size=lambda: (height, width))
    assert scaled_to(height, width, 512) == resized(shaped, 512)


def test_frames_become_tiles_as_whole_images_do(transformers):
    """As its own comment says, transformers' processor of videos gives what that of images gives without tiles."""
    data = written(moving(31), fps=10)
    ours = video_processor(video_processor={**hf.IMAGES, "size": {"longest_edge": 24}, **SAMPLING})
    parts = ours.video(data, "v")
    frames, _, _ = decode_video(data, "v", lambda source: Plan([0, 7, 15, 22, 30], source.height, source.width))
    settings = {"do_image_splitting": False, "size": {"longest_edge": ours.frame_rules.longest_edge}}
    theirs = hf.hf_processor(transformers, "smolvlm", ours, settings).image_processor
    wanted = theirs(images=[Image.fromarray(frame) for frame in frames], return_tensors="np")["pixel_values"]
    got = np.stack([(p.arrays["pixels"].transpose(2, 0, 1) / 255 - 0.5) / 0.5 for p in parts])
    np.testing.assert_allclose(got, wanted[0], rtol=0, atol=1e-6)


def test_prompts_with_videos_equal_those_of_transformers(transformers, monkeypatch):
    """transformers renders a template of its own where there are videos: the released ones know none."""
    processing = transformers.models.smolvlm.processing_smolvlm
    monkeypatch.setattr(processing, "num2words", in_words)
    ours = video_processor()
    data, picture = written(moving(31), fps=10), hf.picture(40, 13)
    parts = {"video": ours.video(data, "v"), "image": ours.tiles(picture)}
    assert len(parts["video"]) == 5
    names = types.SimpleNamespace(
        image_seq_len=ours.num_tile_tokens, image_token="<image>", fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )  # fmt: skip
    told = transformers.video_utils.VideoMetadata(31, 10.0, duration=3.1, frames_indices=[0, 7, 15, 22, 30])
    inputs = {"pixel_values": np.zeros((1, 5, 3, 16, 16)), "video_metadata": [told]}
    video = processing.SmolVLMProcessor.replace_video_token(names, inputs, 0)
    rows, columns = 1, len(parts["image"]) - 1
    image = processing.get_image_prompt_string(
        rows, columns, 4, names.fake_image_token, names.image_token, names.global_image_token
    )
    for order in (["video", "text"], ["image", "text", "video"], ["text", "video", "video"]):
        content = [{"type": kind, "text": "What is it?"} for kind in order]
        hfs = ChatTemplate(processing.DEFAULT_CHAT_TEMPLATE.replace("<|im_start|>", "<|start|>"), {})
        wanted = hfs.render([{"role": "user", "content": content}])
        wanted = wanted.replace("<image>", image, 1).replace("<video>", video)

        kinds = [kind for kind in order if kind != "text"]
        loader = MediaLoader(ours, Settings())
        given = [p if p["type"] == "text" else loader.template_part(MediaPart(p["type"], "p")) for p in content]
        prompt = ChatTemplate(TEMPLATE, {}).render([{"role": "user", "content": given}])
        items = [make_item(MediaPart(kind, "p"), x) for kind in kinds for x in parts[kind]]
        loaded = Loaded(items, [[x.lead for x in parts[kind]] for kind in kinds])
        ids = TOKENIZERS["smolvlm"].encode(loader.rewrite(prompt, loaded)).ids
        tokens, placed = loader.place(ids, loaded)
        assert tokens == TOKENIZERS["smolvlm"].encode(wanted).ids
        assert [m.kind for m in placed] == [kind for kind in kinds for _ in parts[kind]]
        assert all(tokens[m.start : m.start + m.num_tokens] == [IMAGE] * 4 for m in placed)


def test_numbers_in_words():
    for number, words in (
        (1, "one"), (12, "twelve"), (20, "twenty"), (64, "sixty-four"), (100, "one hundred"),
        (101, "one hundred and one"), (345, "three hundred and forty-five"),
    ):  # fmt: skip
        assert in_words(number) == words


def test_where_the_settings_of_videos_are_found():
    assert video_processor().frame_rules == FrameRules(
        fps=2.0, max_frames=5, longest_edge=48, resampling=Image.Resampling.LANCZOS
    ), "the size of images comes first where both share a file"
    own = {"num_frames": 8, "fps": 1, "size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 16}}
    found = video_processor(video_sampling=None, video_processor=own)
    assert (found.frame_rules.max_frames, found.frame_rules.longest_edge) == (8, 24)
    assert video_processor(video_sampling=None).modalities == ("image",)
    assert video_processor().modalities == ("image", "video")
    idefics = idefics3.from_configs(CONFIG | {"model_type": "idefics3"}, {**hf.IMAGES, **SAMPLING})
    assert idefics.modalities == ("image",)
    for changes in ({"max_image_size": {"longest_edge": 32}}, {"image_mean": [0.1] * 3}):
        with pytest.raises(ValueError, match="frames of another size or other scales"):
            video_processor(video_processor=own | changes)
    with pytest.raises(ValueError, match="5000 frames of a video"):
        video_processor(video_processor=own | {"num_frames": 5000})
