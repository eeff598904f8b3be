"""`gemma4_unified`: patches and frames without encoders, against transformers."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from frontend.media.processors import processor_of
from shared.errors import BadModel
from shared.model_files import ModelFiles
from tandem.convert import convert
from tests.support.engine_rig import make_engine
from tests.workers.gemma import hf
from tests.workers.gemma.test_media import AUDIO, IMAGE, VIDEO, logits_with_media, padded
from tests.workers.gemma.test_serving import (
    CLASSES,
    PLACEHOLDERS,
    array_of,
    item,
    pixels,
    prompt,
    run,
)
from workers.load import load
from workers.models.gemma.unified import UnifiedAudioConfig, UnifiedVisionConfig
from workers.models.gemma.vision import cut_patches

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

PATCH, FRAME = 4, 16  # pixels along a side, samples
TEXT = {k: v for k, v in hf.GEMMA4.items() if "per_layer" not in k} | {"pad_token_id": 0, "sliding_window": 32}
VISION = {"mm_embed_dim": 32, "mm_posemb_size": 280, "output_proj_dims": 32, "patch_size": 2, "pooling_kernel_size": 2}


def unified(transformers, folder, text=None):
    config = transformers.Gemma4UnifiedConfig(
        text_config={**TEXT, **(text or {})}, vision_config=VISION, audio_config={"audio_embed_dim": FRAME},
        image_token_id=IMAGE, video_token_id=VIDEO, audio_token_id=AUDIO, boi_token_id=1, eoi_token_id=2,
        boa_token_id=3, eoa_token_index=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma4UnifiedForConditionalGeneration(config))
    return reference, hf.save_and_load(reference, folder)


def image(height, width, seed):
    grid = [1, height // PATCH, width // PATCH]
    return item("image", "pixels", pixels(height, width, seed), grid[1] * grid[2], grid)


def clip(count):
    samples = np.random.default_rng(count).standard_normal((count, FRAME)).astype(np.float32)
    return item("audio", "frames", samples, count)


def patches_of(part):
    patches, grid = cut_patches(mx.array(array_of(part).astype(np.float32) / 255), PATCH)
    return np.array(patches), grid


def hf_inputs(tokens, media, more=0):
    """transformers' arguments for a prompt, and `more` tokens after it."""
    import torch

    made = {"mm_token_type_ids": torch.tensor([[{IMAGE: 1, AUDIO: 3}.get(t, 0) for t in tokens] + [0] * more])}
    images = [patches_of(p) for p in media if p.kind == "image"]
    clips = [array_of(p) for p in media if p.kind == "audio"]
    if images:
        cut, grids = zip(*images, strict=True)
        made["pixel_values"], made["image_position_ids"] = padded(cut, grids, max(map(len, cut)))
    if clips:
        shape = (len(clips), max(map(len, clips)))
        made["input_features"] = torch.zeros((*shape, FRAME))
        made["input_features_mask"] = torch.zeros(shape, dtype=torch.bool)
        for i, rows in enumerate(clips):
            made["input_features"][i, : len(rows)] = torch.tensor(rows)
            made["input_features_mask"][i, : len(rows)] = True
    return made


def encoded(model, part):
    name = part.tensors[0].name
    return model.encode_media({name: mx.array(array_of(part))}, part.grid, part.kind)[0]


CASES = {
    "images see themselves": {},
    "causal": {"use_bidirectional_attention": None},
    "k = v": {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0},
}


@pytest.mark.parametrize("case", CASES)
def test_features_and_logits_equal_transformers(transformers, tmp_path, case):
    """Where an image sees itself, it does so in all layers; the prompt is three windows long."""
    import torch

    reference, model = unified(transformers, tmp_path, CASES[case])
    assert model.whole_media == ([] if case == "causal" else ["image"])
    media = [image(16, 24, 1), clip(37), image(40, 8, 2), clip(9)]
    tokens, media = prompt(
        [7, 8, 1], media[0], [2, 9, 3], media[1], [4, 1], media[2], [2, 10, 3], media[3], [4, 11, 12, 13]
    )
    inputs = hf_inputs(tokens, media)
    features = [encoded(model, part) for part in media]
    with torch.no_grad():
        seen = reference.model.get_image_features(
            inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
        )
        heard = reference.model.get_audio_features(
            inputs["input_features"], inputs["input_features_mask"], return_dict=True
        )
    expected = [seen.pooler_output[0], heard.pooler_output[0], seen.pooler_output[1], heard.pooler_output[1, :9]]
    for got, wanted in zip(features, expected, strict=True):
        np.testing.assert_allclose(np.array(got), wanted.numpy(), rtol=0, atol=1e-4)
    wanted = hf.hf_logits(reference, [tokens], **inputs)
    np.testing.assert_allclose(logits_with_media(model, tokens, features), wanted, rtol=0, atol=1e-4)


REQUESTS = {
    "text": prompt([5, 9, 4]),
    "image": prompt([7, 8], image(16, 24, 1), [9, 10]),
    "clip": prompt([11], clip(70), [12, 13, 14]),
    "image and clip": prompt([15, 16, 17], image(16, 20, 2), [18], clip(41), [19], image(8, 8, 3), [20] * 30),
    "the same image": prompt([7, 8], image(16, 24, 1), [21]),
}


def test_batches_of_all_kinds_equal_transformers(transformers, tmp_path):
    reference, model = unified(transformers, tmp_path)
    engine = make_engine(model, classes=CLASSES, max_width=64)
    assert engine.media.modalities == ["image", "audio"]
    alone = {}
    for name, request in REQUESTS.items():
        alone |= run(engine, {name: request}, num_tokens=32)[0]
        tokens, media = request
        assert len(alone[name]) == 32
        assert hf.hf_agrees(reference, tokens, alone[name], PLACEHOLDERS, **hf_inputs(tokens, media, 32)), name
    assert run(engine, REQUESTS, random.Random(3), num_tokens=32)[0] == alone
    assert engine.media.num_encoder_runs == 5, "equal content is encoded once"


def test_converted_and_original_checkpoints_give_equal_features_and_logits(transformers, tmp_path):
    """The original holds `vision_embedder.` and `embed_vision.embedding_projection`, later ones one `embed_vision.`."""
    _, model = unified(transformers, tmp_path / "original", {"attention_k_eq_v": True})
    names = load_file(tmp_path / "original" / "model.safetensors")
    assert "model.vision_embedder.patch_dense.weight" in names
    made = convert(str(tmp_path / "original"), tmp_path / "converted", dtype="float32")
    assert made.num_encoder_tensors == sum("embed" in n and "language_model" not in n for n in names) == 11
    renamed = {
        n.replace("embed_vision.", "embed_vision.multimodal_embedder.").replace("vision_embedder.", "embed_vision."): w
        for n, w in names.items()
    }
    (tmp_path / "renamed").mkdir()
    save_file(renamed, tmp_path / "renamed" / "model.safetensors", {"format": "pt"})
    (tmp_path / "renamed" / "config.json").write_text((tmp_path / "original" / "config.json").read_text())
    tokens, media = prompt([7, 1], image(16, 24, 1), [2, 3], clip(9), [4, 9])
    features = [encoded(model, part) for part in media]
    logits = logits_with_media(model, tokens, features)
    for folder in ("converted", "renamed"):
        other = load(ModelFiles(name="m", folder=tmp_path / folder), "float32").model
        assert other.modalities == ["image", "audio"]
        for part, wanted in zip(media, features, strict=True):
            np.testing.assert_array_equal(np.array(encoded(other, part)), np.array(wanted))
        np.testing.assert_allclose(logits_with_media(other, tokens, features), logits, rtol=0, atol=1e-5)


def test_a_packed_conversion_sees_and_hears_as_its_source(transformers, tmp_path):
    _, model = unified(transformers, tmp_path / "original")
    convert(str(tmp_path / "original"), tmp_path / "packed", bits=8, group_size=32)
    packed = load(ModelFiles(name="m", folder=tmp_path / "packed"), "float32").model
    for part in (image(16, 24, 1), clip(9)):
        np.testing.assert_array_equal(np.array(encoded(packed, part)), np.array(encoded(model, part)))


def test_the_processor_prepares_what_the_model_takes(transformers, tmp_path):
    """End to end, from a picture and a clip: what the frontend sends is what the model's positions and frames are."""
    import io

    import soundfile
    from PIL import Image

    _, model = unified(transformers, tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 24}}')
    processor = processor_of(tmp_path)
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(0).standard_normal(100).astype(np.float32) * 0.1, 16_000, format="WAV")
    picture = Image.fromarray(pixels(30, 40, 1))
    for processed, kind in (
        (processor.image(picture), "image"), (processor.audio(file.getvalue(), "x"), "audio"),
    ):  # fmt: skip
        arrays = {name: mx.array(array) for name, array in processed.arrays.items()}
        rows = model.encode_media(arrays, processed.grid, kind)
        assert rows.shape == (1, processed.num_tokens, 64)
    assert processor.audio(file.getvalue(), "x").num_tokens == 7


def test_images_larger_than_the_window_are_refused(transformers, tmp_path):
    """There the reference lets an image see itself beyond the window, which the attention seam does not."""
    unified(transformers, tmp_path, {"sliding_window": 280})
    assert processor_of(tmp_path).modalities == ("image", "audio")
    unified(transformers, tmp_path, {"sliding_window": 279})
    with pytest.raises(BadModel, match=r"max_soft_tokens 280 .* sliding_window 279"):
        processor_of(tmp_path)
    unified(transformers, tmp_path, {"sliding_window": 279, "use_bidirectional_attention": None})
    assert processor_of(tmp_path).modalities == ("image", "audio")


def test_text_only_weights_serve_text(transformers, tmp_path):
    reference, _ = unified(transformers, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: array for name, array in weights.items() if "language_model" in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    assert model.modalities == []
    tokens = [[5, 6, 7, 8]]
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), hf.hf_logits(reference, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"mm_embed_dim": 32, "output_proj_dims": 16}, "output_proj_dims 16"), ({"patch_size": "x"}, "malformed")],
)
def test_what_the_projection_does_not_compute_is_refused(config, reason):
    with pytest.raises(BadModel, match=reason):
        UnifiedVisionConfig.from_hf(config)


def test_malformed_audio_is_refused():
    with pytest.raises(BadModel, match="malformed"):
        UnifiedAudioConfig.from_hf({"audio_embed_dim": "many"})
