"""Audio files of all kinds, good and bad, and their log-mel frames against transformers'."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import soundfile

from frontend.media.audio import decode
from frontend.media.log_mel import LogMel
from frontend.media.processors.gemma import from_configs
from frontend.media.raw_frames import RawFrames
from shared.errors import BadModel, InvalidRequest

RATE = 16_000


def tone(seconds=0.5, rate=RATE, channels=1):
    t = np.arange(int(seconds * rate)) / rate
    wave = np.stack([0.4 * np.sin(2 * np.pi * 440 * t + c) for c in range(channels)], axis=1)
    return wave.astype(np.float32)


def written(samples, rate=RATE, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def m4a(samples, rate=RATE):
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="ipod") as box:
        stream = box.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples.T, format="fltp", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            box.mux(packet)
    return file.getvalue()


LOSSLESS = {
    "wav": written(tone()),
    "wav float": written(tone(), subtype="FLOAT"),
    "flac": written(tone(), kind="FLAC"),
}
LOSSY = {
    "mp3": written(tone(), kind="MP3"),
    "ogg": written(tone(), kind="OGG"),
    "m4a": m4a(tone()),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_files_give_their_samples(name):
    np.testing.assert_allclose(decode(LOSSLESS[name], RATE, 30, "x"), tone()[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_files_sound_alike(name):
    samples = decode(LOSSY[name], RATE, 30, "x")
    # Encoders pad and delay; the tone's frequency and level stay.
    assert abs(len(samples) - RATE // 2) < 4000
    middle = samples[2000:6000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(np.argmax(spectrum) * RATE / len(middle) - 440) < 10
    assert 0.25 < np.sqrt(np.mean(middle**2)) < 0.31


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(rate):
    got = decode(written(tone(rate=rate), rate, subtype="FLOAT"), RATE, 30, "x")
    assert len(got) == RATE // 2
    inner = slice(500, -500)  # a filter rings where the tone begins and ends
    np.testing.assert_allclose(got[inner], tone()[inner, 0], rtol=0, atol=1e-3)


def test_channels_are_averaged():
    surround = tone(channels=6)
    np.testing.assert_allclose(decode(written(surround), RATE, 30, "x"), surround.mean(axis=1), rtol=0, atol=1e-4)


def test_eight_bits():
    samples = decode(written(tone(), subtype="PCM_U8"), RATE, 30, "x")
    np.testing.assert_allclose(samples, tone()[:, 0], rtol=0, atol=0.01)


def cut_header(count):
    """A WAV that announces more samples than it holds."""
    content = bytearray(LOSSLESS["wav"])
    content[40:44] = int(count).to_bytes(4, "little")
    return bytes(content)


BAD = {
    "nothing": (b"", "empty"),
    "random bytes": (np.random.default_rng(1).bytes(5000), "cannot be read"),
    "text": (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/a.ts\n", "cannot be read"),
    "half a header": (LOSSLESS["wav"][:20], "cannot be read"),
    "half an m4a": (LOSSY["m4a"][: len(LOSSY["m4a"]) // 3], "cannot be read|no samples"),
    "no samples": (written(np.zeros((0, 1), np.float32)), "no samples"),
    "not a number": (written(np.full((100, 1), np.nan, np.float32), subtype="FLOAT"), "not numbers"),
    "too long": (written(np.zeros((31 * RATE, 1), np.float32)), "longer than the 30 s"),
    "three hours of a low rate": (written(np.zeros((3 * 3600 * 8000,), np.int16), 8000, "FLAC"), "longer than"),
    "too long m4a": (m4a(np.zeros((31 * RATE, 1), np.float32)), "longer than"),
    "a rate of 1 Hz": (written(np.zeros((10, 1), np.float32), 1), "sampling rate of 1 Hz"),
    "an image": (
        base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="),
        "cannot be read|holds no audio",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_reason(case):
    content, reason = BAD[case]
    with pytest.raises(InvalidRequest, match=reason) as caught:
        decode(content, RATE, 30, "messages.0.content.1.input_audio")
    assert caught.value.param == "messages.0.content.1.input_audio"


def test_a_header_that_lies_about_its_length_is_not_believed():
    assert len(decode(cut_header(2**31), RATE, 30, "x")) == RATE // 2


@pytest.mark.parametrize("count", [0, 1, 160])
def test_a_clip_without_a_whole_frame_is_refused(count):
    with pytest.raises(InvalidRequest, match="shorter than one frame"):
        LogMel()(np.zeros((count,), np.float32), "x")


MELS = {
    "released": {},
    "preemphasis": {"preemphasis": 0.97},
    "plain preemphasis": {"preemphasis": 0.97, "preemphasis_htk_flavor": False},
    "longer frames": {"frame_length_ms": 32.0, "fft_overdrive": True, "min_frequency": 125.0, "max_frequency": 7600.0},
    "normalised": {"per_bin_mean": [0.5] * 128, "per_bin_stddev": [2.0] * 128, "input_scale_factor": 2.0},
}


@pytest.mark.oracle
@pytest.mark.parametrize("case", MELS)
@pytest.mark.parametrize("count", [161, 320, 1000, 16_000, 16_001, 20_479])
def test_log_mel_frames_equal_transformers(case, count):
    module = pytest.importorskip("transformers.models.gemma4.feature_extraction_gemma4")
    reference = module.Gemma4AudioFeatureExtractor(**MELS[case])
    samples = np.random.default_rng(count).standard_normal(count).astype(np.float32) * 0.1
    expected = reference([samples], return_tensors="np")
    mels = LogMel.from_hf(MELS[case])
    mask = expected["input_features_mask"][0]
    assert mels.num_frames(count) == mask.sum()
    assert mels.num_tokens(count) == mask[::2][::2].sum()
    if mask.sum():
        np.testing.assert_allclose(mels(samples, "x"), expected["input_features"][0][mask], rtol=0, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "config",
    [{}, {"preemphasis_htk_flavor": False, "per_bin_mean": [0.5] * 128, "input_scale_factor": 2.0}],
    ids=["released", "other"],
)
@pytest.mark.parametrize("count", [513, 640, 1000, 16_000, 16_001, 480_000])
def test_gemma3n_frames_equal_transformers(config, count):
    """Of one clip: each frame is of samples, if not of real ones alone, and none is masked."""
    module = pytest.importorskip("transformers.models.gemma3n.feature_extraction_gemma3n")
    samples = np.random.default_rng(count).standard_normal(count).astype(np.float32) * 0.1
    samples[count // 2 :] *= 1e-7  # down to the floor
    expected = module.Gemma3nAudioFeatureExtractor(**config)([samples], return_tensors="np")
    assert expected["input_features_mask"].all()
    mels = LogMel.from_hf(config, is_gemma3n=True)
    assert mels.num_frames(count) == expected["input_features"].shape[1]
    np.testing.assert_allclose(mels(samples, "x"), expected["input_features"][0], rtol=0, atol=1e-5)


def test_a_clip_for_gemma3n_takes_one_number_of_tokens():
    """Older checkpoints hold the extractor's settings beside the image processor's."""
    config = {"model_type": "gemma3n", "audio_config": {}, "vision_config": {}}
    size = {"height": 768, "width": 768}
    processor = from_configs(config, {"image_processor_type": "x", "mel_floor": 1e-3, "size": size})
    assert processor.modalities == ("image", "audio")
    assert processor.audio(LOSSLESS["wav"], "x").num_tokens == 188
    quiet = processor.audio(written(np.zeros((RATE, 1), np.float32)), "x")
    np.testing.assert_allclose(quiet.arrays["frames"], np.log(1e-3), rtol=1e-6)
    assert processor.expansion("audio", 1) == ([256_000, 262_273, 262_272], 1)
    assert processor.rewrite("a<audio_soft_token>b") == "a\n\n<audio_soft_token>\n\nb"
    with pytest.raises(InvalidRequest, match="shorter than one frame of 32 ms"):
        processor.audio(written(tone(0.02)), "x")


def test_silence_gives_the_floor():
    mels = LogMel()(np.zeros((RATE,), np.float32), "x")
    np.testing.assert_allclose(mels, np.log(1e-3), rtol=1e-6)


def test_dither_is_refused():
    with pytest.raises(BadModel, match="dither"):
        LogMel.from_hf({"dither": 1e-4})


@pytest.mark.oracle
@pytest.mark.parametrize("count", [1, 639, 640, 641, 16_000])
def test_raw_frames_equal_transformers(count):
    module = pytest.importorskip("transformers.models.gemma4_unified.feature_extraction_gemma4_unified")
    samples = np.random.default_rng(count).standard_normal(count).astype(np.float32) * 0.1
    expected = module.Gemma4UnifiedAudioFeatureExtractor()([samples], return_tensors="np")
    frames = RawFrames()
    np.testing.assert_array_equal(frames(samples, "x"), expected["input_features"][0])
    assert frames.num_tokens(count) == expected["input_features_mask"][0].sum()


def test_a_clip_for_gemma4_unified_travels_as_its_samples():
    config = {"model_type": "gemma4_unified", "audio_config": {"audio_embed_dim": 320}, "audio_token_id": 7}
    processor = from_configs(config, {})
    assert processor.modalities == ("audio",)
    processed = processor.audio(LOSSLESS["wav"], "x")
    assert processed.num_tokens == 25 and processed.arrays["frames"].shape == (25, 320)
    np.testing.assert_allclose(processed.arrays["frames"].ravel(), tone()[:, 0], rtol=0, atol=1e-4)
    with pytest.raises(InvalidRequest, match="longer than the 30 s"):
        processor.audio(written(np.zeros((31 * RATE, 1), np.float32)), "x")
