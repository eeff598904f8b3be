"""Audio in chat requests to a Gemma model: what reaches the engine, and what bad input is answered with."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from frontend.media.audio import BLOCK, decode
from frontend.media.loader import MediaLoader
from frontend.media.log_mel import LogMel
from frontend.media.processors.gemma import from_configs
from shared.messages import Submit
from tests.frontend.conftest import byte_text, ids
from tests.support.fake_engine import says

AUDIO, IMAGE, OPEN, CLOSE = 0, 1, 70, 71  # special tokens play the placeholders, others what frames them
RATE = 16_000
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'audio' %}<|endoftext|>{% elif p['type'] == 'image' %}<|im_start|>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
CONFIG = {
    "model_type": "gemma4", "vision_config": {}, "audio_config": {}, "audio_token_id": AUDIO, "image_token_id": IMAGE,
    "boa_token_id": OPEN, "eoa_token_index": CLOSE, "boi_token_id": OPEN, "eoi_token_id": CLOSE,
}  # fmt: skip


@pytest.fixture
def audio_server(engine, start_server, settings):
    running = start_server(byte_text(chat_template=TEMPLATE), media=MediaLoader(from_configs(CONFIG, {}), settings))
    running.wait_status("/health", 200)
    engine.on_submit = says(ids("ok"))
    return running


def wav(samples, rate=RATE, subtype="PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def noise(seconds, channels=1):
    return np.random.default_rng(1).standard_normal((int(seconds * RATE), channels)).astype(np.float32) * 0.1


def audio(data, label="wav"):
    content = {"data": base64.b64encode(data).decode(), **({} if label is None else {"format": label})}
    return {"type": "input_audio", "input_audio": content}


def ask(server, *parts):
    messages = [{"role": "user", "content": list(parts)}]
    return server.http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 2})


def last_submit(engine):
    return [message for message in engine.received if isinstance(message, Submit)][-1]


def text(words):
    return {"type": "text", "text": words}


def test_clips_and_images_reach_the_engine_in_their_places(audio_server, engine):
    first, second = wav(noise(1.0)), wav(noise(0.2))
    picture = io.BytesIO()
    Image.new("RGB", (30, 20)).save(picture, "PNG")
    image = {"url": "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()}
    reply = ask(
        audio_server,
        text("a"),
        audio(first),
        text("b"),
        {"type": "image_url", "image_url": image},
        audio(second, "mp3"),
    )
    assert reply.status_code == 200, reply.text
    submit = last_submit(engine)
    clip, picture_item, short = submit.media
    assert [clip.kind, picture_item.kind, short.kind] == ["audio", "image", "audio"]
    a, b = ids("a"), ids("b")
    assert (clip.num_tokens, short.num_tokens) == (25, 5)
    assert submit.prompt_token_ids == [
        *a, OPEN, *[AUDIO] * 25, CLOSE, *b, OPEN, *[IMAGE] * picture_item.num_tokens, CLOSE, OPEN, *[AUDIO] * 5, CLOSE,
    ]  # fmt: skip
    assert clip.start == len(a) + 1
    assert picture_item.start == clip.start + 25 + 1 + len(b) + 1
    assert short.start == picture_item.start + picture_item.num_tokens + 2
    (tensor,) = clip.tensors
    expected = LogMel()(decode(first, RATE, 30, "x"), "x")
    np.testing.assert_array_equal(np.frombuffer(tensor.data, np.float32).reshape(tensor.shape), expected)


GOOD = {
    "silence": (wav(np.zeros((RATE,), np.float32)), "wav"),
    "8 bits": (wav(noise(0.3), subtype="PCM_U8"), "wav"),
    "5.1 channels": (wav(noise(0.3, 6)), "wav"),
    "another rate": (wav(noise(0.3), 44_100), "wav"),
    "a wrong label": (wav(noise(0.3)), "flac"),
    "no label": (wav(noise(0.3)), None),
}


@pytest.mark.parametrize("case", GOOD)
def test_odd_but_readable_audio_gets_an_answer(audio_server, case):
    assert ask(audio_server, audio(*GOOD[case])).status_code == 200


def test_a_data_uri(audio_server, engine):
    uri = "data:audio/wav;base64," + base64.b64encode(wav(noise(0.3))).decode()
    assert ask(audio_server, {"type": "input_audio", "input_audio": {"data": uri}}).status_code == 200
    assert last_submit(engine).media[0].num_tokens == 8


BAD = {
    "random bytes": (np.random.default_rng(1).bytes(3000), "cannot be read"),
    "one sample": (wav(np.zeros((1,), np.float32)), "shorter than one frame"),
    "too long": (wav(np.zeros((31 * RATE,), np.float32)), "longer than the 30 s"),
    "no bytes": (b"", "input_audio"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(200), "cannot be read"),
}


def long_silence(kind):
    """Three hours, 345 MB as floats: a minute whose frames are repeated (MP3), or a file written in blocks."""
    file = io.BytesIO()
    minute, num_minutes = np.zeros((60 * 8000,), np.int16), 180
    with soundfile.SoundFile(file, "w", 8000, 1, format=kind) as out:
        for _ in range(1 if kind == "MP3" else num_minutes):
            out.write(minute)
    return file.getvalue() * (num_minutes if kind == "MP3" else 1)


@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_three_hours_are_refused_before_they_are_decoded(audio_server, kind, monkeypatch):
    content = long_silence(kind)
    num_frames = 0
    blocks = soundfile.SoundFile.blocks

    def counted(self, *args, **kwargs):
        nonlocal num_frames
        for block in blocks(self, *args, **kwargs):
            num_frames += len(block)
            yield block

    monkeypatch.setattr(soundfile.SoundFile, "blocks", counted)
    reply = ask(audio_server, audio(content, kind.lower()))
    assert reply.status_code == 400
    assert "longer than the 30 s" in reply.json()["error"]["message"]
    assert reply.json()["error"]["param"].startswith("messages[0].content[0].input_audio")
    assert 30 * 8000 < num_frames <= 30 * 8000 + BLOCK, "as much as tells it, whatever the file holds"
    assert ask(audio_server, text("still there")).status_code == 200


@pytest.mark.parametrize("case", BAD)
def test_bad_audio_is_a_400_that_names_the_part(audio_server, case):
    data, reason = BAD[case]
    reply = ask(audio_server, text("a"), audio(data))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"].startswith("messages[0].content[1].input_audio")
    assert reason in error["message"]
    assert ask(audio_server, text("still there")).status_code == 200


MALFORMED = {
    "unknown label": ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "exe"}}, "input_audio.format"),
    "not base64": ({"type": "input_audio", "input_audio": {"data": "###", "format": "wav"}}, "input_audio.data"),
    "no data": ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data"),
    "a string": ({"type": "input_audio", "input_audio": "AAAA"}, "input_audio"),
    "unknown field": ({"type": "input_audio", "input_audio": {"data": "AAAA", "speed": 2}}, "input_audio.speed"),
    "URI without base64": ({"type": "input_audio", "input_audio": {"data": "data:audio/wav,x"}}, "input_audio.data"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_parts_are_a_400_that_names_the_field(audio_server, case):
    part, field = MALFORMED[case]
    reply = ask(audio_server, part)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == f"messages[0].content[0].{field}"
