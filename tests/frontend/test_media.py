"""Images in chat requests: what reaches the engine, and what a bad one is answered with."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from frontend.media.loader import MAX_ITEMS, MediaLoader
from frontend.media.processors import processor_of
from frontend.media.processors.qwen import QwenProcessor
from shared.messages import Submit
from tests.frontend.conftest import TOKENIZER, byte_text, ids
from tests.support.fake_engine import says

PAD = 0  # <|endoftext|> plays the placeholder
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<|endoftext|>{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
PROCESSOR = QwenProcessor(
    patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096, mean=(0.5,) * 3, std=(0.5,) * 3,
    image_token_id=PAD,
)  # fmt: skip


@pytest.fixture
def media_server(engine, start_server, settings):
    running = start_server(byte_text(chat_template=TEMPLATE), media=MediaLoader(PROCESSOR, settings))
    running.wait_status("/health", 200)
    engine.on_submit = says(ids("ok"))
    return running


def encoded(picture, form="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def picture(width=40, height=24, seed=0, mode="RGB"):
    channels = {"RGB": 3, "RGBA": 4}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(array)


def uri(data, media_type="image/png"):
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def part(data):
    return {"type": "image_url", "image_url": {"url": uri(data), "detail": "auto"}}


def ask(server, content, **more):
    return server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 2, **more}
    )


def last_submit(engine):
    return [message for message in engine.received if isinstance(message, Submit)][-1]


def huge_png():
    """A head that promises 30,000 x 30,000 pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def animated():
    frames = [picture(seed=i) for i in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


BAD = {
    "truncated JPEG": (encoded(picture(200, 200), "JPEG")[:900], "cut short or damaged"),
    "huge PNG": (huge_png(), "30000 x 30000 pixels"),
    "zero bytes": (b"", "no bytes"),
    "animated GIF": (animated(), "animated"),
    "TIFF": (encoded(picture(), "TIFF"), "supported format"),
    "text": (b"hello", "supported format"),
    "random bytes behind a PNG head": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "supported format"),
    "a line": (encoded(picture(1000, 2)), "ratios up to 200"),
}


def test_two_images_reach_the_engine_in_their_places(media_server, engine):
    first, second = picture(40, 24), picture(16, 16, 1)
    content = [part(encoded(first)), {"type": "text", "text": "and"}, part(encoded(second, "BMP"))]
    assert ask(media_server, content).status_code == 200
    submit = last_submit(engine)
    assert [(m.kind, m.num_tokens, m.grid) for m in submit.media] == [
        ("image", 15, [1, 6, 10]),
        ("image", 4, [1, 4, 4]),
    ]
    head = ids("<|im_start|>user\n")
    middle = ids("and")
    assert submit.prompt_token_ids == [*head, *[PAD] * 15, *middle, *[PAD] * 4, *ids("<|im_end|>\n")]
    assert [m.start for m in submit.media] == [len(head), len(head) + 15 + len(middle)]
    tensors = {t.name: t for t in submit.media[0].tensors}
    frames = np.frombuffer(tensors["frames"].data, np.uint8).reshape(tensors["frames"].shape)
    np.testing.assert_array_equal(frames[0], np.asarray(first))


def test_equal_pictures_have_equal_hashes_whatever_the_file(media_server, engine):
    same = picture()
    assert ask(
        media_server, [part(encoded(same)), part(encoded(same, "BMP")), part(encoded(picture(seed=1)))]
    ).is_success
    hashes = [m.content_hash for m in last_submit(engine).media]
    assert hashes[0] == hashes[1] != hashes[2]


def test_transparent_and_turned_pictures_are_read_as_shown(media_server, engine):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture(40, 24), "JPEG", exif=exif)
    assert ask(media_server, [part(encoded(picture(mode="RGBA"))), part(turned)]).is_success
    assert [m.grid for m in last_submit(engine).media] == [[1, 6, 10], [1, 10, 6]]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_a_400_and_the_server_goes_on(media_server, name):
    data, words = BAD[name]
    answer = ask(media_server, [{"type": "text", "text": "what"}, part(data)])
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"] == "messages[0].content[1].image_url.url"
    assert ask(media_server, "hello").status_code == 200


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://example.com/cat.png", "fetching URLs is off"),
        ("file:///etc/passwd", "allowed folders only"),
        ("data:image/png,abc", "data URI"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("", "expected a URL"),
    ],
)
def test_a_url_that_is_not_read_is_a_400(media_server, url, words):
    answer = ask(media_server, [{"type": "image_url", "image_url": {"url": url}}])
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_unknown_fields_of_a_part_are_named(media_server):
    wrong = part(encoded(picture())) | {"colour": 1}
    assert ask(media_server, [wrong]).json()["error"]["param"] == "messages[0].content[0].colour"
    wrong = {"type": "image_url", "image_url": {"url": "data:,", "size": 1}}
    assert ask(media_server, [wrong]).json()["error"]["param"] == "messages[0].content[0].image_url.size"


@pytest.mark.parametrize("kind", [[[]], {"a": 1}, None, 5])
def test_a_type_that_is_no_text_is_a_400(media_server, kind):
    answer = ask(media_server, [{"type": kind, "text": "a"}])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0].type"


def test_200_images_and_a_video_are_400s(media_server):
    small = part(encoded(picture(8, 8)))
    answer = ask(media_server, [small] * 200)
    assert answer.status_code == 400
    assert f"{MAX_ITEMS} are allowed" in answer.json()["error"]["message"]
    video = {"type": "video_url", "video_url": {"url": uri(b"", "video/mp4")}}
    answer = ask(media_server, [video])
    assert answer.status_code == 400
    assert "video input is not supported" in answer.json()["error"]["message"]


def test_a_placeholder_written_as_text_is_a_400(media_server):
    answer = ask(media_server, [{"type": "text", "text": "<|endoftext|>"}, part(encoded(picture()))])
    assert answer.status_code == 400
    assert "placeholder without an image" in answer.json()["error"]["message"]


def test_an_image_for_a_text_model_is_a_400(server):
    answer = ask(server, [part(encoded(picture()))])
    assert answer.status_code == 400
    assert "takes text only" in answer.json()["error"]["message"]


def test_modalities_are_told(media_server, server):
    assert media_server.http.get("/health").json()["input_modalities"] == ["text", "image"]
    assert media_server.http.get("/v1/models").json()["data"][0]["input_modalities"] == ["text", "image"]
    assert server.http.get("/health").json()["input_modalities"] == ["text"]


def test_images_of_the_messages_api(media_server, engine):
    data = encoded(picture())
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}

    def post(source):
        content = [{"type": "image", "source": source}, {"type": "text", "text": "what"}]
        body = {"model": "default", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
        return media_server.http.post("/v1/messages", json=body)

    assert post(source).status_code == 200, post(source).text
    assert [m.num_tokens for m in last_submit(engine).media] == [15]
    for bad, words in (
        (source | {"data": "@@"}, "not valid base64"), (source | {"data": ""}, "no bytes"),
        ({"type": "file", "file_id": "x"}, "not supported"), (source | {"x": 1}, "unknown"),
        ({"type": "url", "url": "https://example.com/a.png"}, "fetching URLs is off"),
    ):  # fmt: skip
        answer = post(bad)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_a_processor_is_chosen_by_the_configuration(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert processor_of(tmp_path) is None
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3_vl", "image_token_id": 7, "vision_config": {"patch_size": 16}}'
    )
    found = processor_of(tmp_path)
    assert (found.patch_size, found.min_pixels, found.mean, found.placeholders) == (
        16,
        65_536,
        (0.5,) * 3,
        {"image": 7},
    )
    for model_type in ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"):
        hybrid = json.loads((tmp_path / "config.json").read_text()) | {"model_type": model_type}
        (tmp_path / "config.json").write_text(json.dumps(hybrid))
        assert processor_of(tmp_path) == found
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5", "text_config": {}}')
    assert processor_of(tmp_path) is None, "a conversion that left the image encoder out"
    (tmp_path / "config.json").write_text(json.dumps(hybrid))
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 5, "size": {"longest_edge": 9}}')
    assert (processor_of(tmp_path).min_pixels, processor_of(tmp_path).max_pixels) == (5, 9)


assert TOKENIZER.token_to_id("<|endoftext|>") == PAD
