"""Image and audio encoders against transformers, and logits of prompts that hold images and clips."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support import tiny_gemma4
from tests.workers.gemma import hf
from workers.cache.store import CacheStore

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

IMAGE, VIDEO, AUDIO = 90, 91, 92  # placeholders
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
VISION = tiny_gemma4.VISION | {"num_hidden_layers": 2, "position_embedding_size": 40}
AUDIO_TOWER = tiny_gemma4.AUDIO | {"num_hidden_layers": 2}
TEXT = {"pad_token_id": 0, "hidden_size_per_layer_input": 12}

GEMMA4_CASES = {
    "plain": ({}, {}, {}),
    "clipped, standardised": ({"use_clipped_linears": True, "standardize": True}, {}, {}),
    "unclipped audio": ({}, {"use_clipped_linears": False}, {}),
    "images see themselves in sliding layers": ({}, {}, {"use_bidirectional_attention": "vision"}),
    "as many kv heads, smaller patches": ({"num_key_value_heads": 4, "patch_size": 2}, {}, {}),
    "other audio windows": (
        {}, {"attention_chunk_size": 5, "attention_context_left": 8, "attention_context_right": 3}, {},
    ),
}  # fmt: skip


def gemma4(transformers, folder, vision=None, audio=None, text=None):
    """transformers' model and ours with the same weights; clipping ranges are narrow enough to matter."""
    import torch

    config = transformers.Gemma4Config(
        text_config={**hf.GEMMA4, **TEXT, **(text or {})}, vision_config={**VISION, **(vision or {})},
        audio_config={**AUDIO_TOWER, **(audio or {})}, image_token_id=IMAGE, video_token_id=VIDEO,
        audio_token_id=AUDIO, boi_token_id=1, eoi_token_id=2, boa_token_id=3, eoa_token_index=4,
    )  # fmt: skip
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma4ForConditionalGeneration(config))
    with torch.no_grad():
        for name, buffer in reference.named_buffers():
            if name.endswith(("input_min", "output_min")):
                buffer.fill_(-1.5)
            elif name.endswith(("input_max", "output_max")):
                buffer.fill_(1.25)
            elif name.endswith(("std_bias", "std_scale")):
                buffer.copy_(1.0 + 0.1 * torch.randn(buffer.shape))
    return reference, hf.save_and_load(reference, folder)


def patches(grid, patch_size, seed):
    return np.random.default_rng(seed).random((grid[0] * grid[1], 3 * patch_size**2)).astype(np.float32)


def padded(images, grids, num_patches):
    """As transformers' image processor pads: pixel values and positions of all images."""
    import torch

    pixels = np.zeros((len(images), num_patches, images[0].shape[1]), np.float32)
    positions = np.full((len(images), num_patches, 2), -1)
    for i, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        pixels[i, : len(image)] = image
        positions[i, : len(image)] = [(x, y) for y in range(rows) for x in range(columns)]
    return torch.tensor(pixels), torch.tensor(positions)


def frames(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 128)).astype(np.float32)


@pytest.mark.parametrize("case", GEMMA4_CASES)
def test_gemma4_features_and_logits_equal_transformers(transformers, tmp_path, case):
    import torch

    vision, audio, text = GEMMA4_CASES[case]
    reference, model = gemma4(transformers, tmp_path, vision, audio, text)
    k = {**VISION, **vision}["pooling_kernel_size"]
    grids = [(4, 6), (2, 8)]
    patch_size = {**VISION, **vision}["patch_size"]
    images = [patches(grid, patch_size, seed) for seed, grid in enumerate(grids)]
    pixels, positions = padded(images, grids, 24)
    with torch.no_grad():
        expected = reference.model.get_image_features(pixels, positions, return_dict=True).pooler_output
    features = [model.encode_image(mx.array(image), grid) for image, grid in zip(images, grids, strict=True)]
    for got, wanted in zip(features, expected, strict=True):
        np.testing.assert_allclose(np.array(got), wanted.numpy(), rtol=0, atol=1e-4)

    lengths = (150, 61)
    clips = [frames(n, n) for n in lengths]
    mels = torch.zeros((2, 152, 128))
    mask = torch.zeros((2, 152), dtype=torch.bool)
    for i, clip in enumerate(clips):
        mels[i, : len(clip)] = torch.tensor(clip)
        mask[i, : len(clip)] = True
    with torch.no_grad():
        output = reference.model.get_audio_features(mels, mask, return_dict=True)
    sounds = [model.encode_audio(mx.array(clip)) for clip in clips]
    for i, got in enumerate(sounds):
        wanted = output.pooler_output[i][output.attention_mask[i]]
        np.testing.assert_allclose(np.array(got), wanted.numpy(), rtol=0, atol=1e-4)

    numbers = [24 // k**2, 16 // k**2, -(-150 // 4), 16]
    assert [len(f) for f in (*features, *sounds)] == numbers
    tokens = [7, 8, 1, *[IMAGE] * numbers[0], 2, 9, 3, *[AUDIO] * numbers[2], 4, 1, *[IMAGE] * numbers[1], 2, 10, 3]
    tokens += [*[AUDIO] * numbers[3], 4, 11, 12, 13]
    kinds = [[{IMAGE: 1, AUDIO: 3}.get(t, 0) for t in tokens]]
    wanted = hf.hf_logits(
        reference, [tokens], pixel_values=pixels, image_position_ids=positions, input_features=mels,
        input_features_mask=mask, mm_token_type_ids=torch.tensor(kinds),
    )  # fmt: skip
    media = [features[0], sounds[0], features[1], sounds[1]]
    np.testing.assert_allclose(logits_with_media(model, tokens, media), wanted, rtol=0, atol=1e-4)


def stretches(tokens, placeholders):
    """(first, end) of each run of placeholders."""
    found = []
    for i, token in enumerate(tokens):
        if token in placeholders and (i == 0 or tokens[i - 1] != token):
            found.append([i, i])
        if token in placeholders:
            found[-1][1] = i + 1
    return [tuple(pair) for pair in found]


def logits_with_media(model, tokens, media):
    """Through the cache, in two chunks that end between media, the embeddings of placeholders replaced."""
    embeddings = model.embed(mx.array([tokens]))
    places = stretches(tokens, (IMAGE, AUDIO))
    for (first, end), rows in zip(places, media, strict=True):
        embeddings[0, first:end] = rows
    store = CacheStore(model.layer_specs(), [128], 128, mx.float32, True)
    store.ensure(0, 128)
    images = stretches(tokens, (IMAGE,))
    cut = places[1][0] - 1
    parts = []
    for first, end in ((0, cut), (cut, len(tokens))):
        batch = store.open([0], [first], end - first, spans=[[s for s in images if first <= s[0] < end]])
        parts.append(
            model(mx.array([tokens[first:end]]), cache=batch.layers, input_embeddings=embeddings[:, first:end])
        )
        batch.close()
    return np.array(mx.concatenate(parts, axis=1))


@pytest.mark.parametrize("num_tokens", [16, 4])
def test_gemma3_features_and_logits_equal_transformers(transformers, tmp_path, num_tokens):
    """Tokens of one image see each other in all layers; an image is longer than the window of the sliding ones."""
    import torch

    config = transformers.Gemma3Config(
        text_config={**hf.GEMMA3, "pad_token_id": 0}, vision_config=SIGLIP, mm_tokens_per_image=num_tokens,
        image_token_id=IMAGE, boi_token_index=1, eoi_token_index=2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    reference = hf.randomise(transformers.Gemma3ForConditionalGeneration(config))
    model = hf.save_and_load(reference, tmp_path)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        expected = reference.model.get_image_features(torch.tensor(pixels), return_dict=True).pooler_output.numpy()
    features = [model.encode_image(mx.array(image), (8, 8)) for image in pixels]
    np.testing.assert_allclose(np.stack(features), expected, rtol=0, atol=1e-4)
    image = [1, *[IMAGE] * num_tokens, 2]
    tokens = [5, 6, *image, 7, 8, 9, *image, 10, 11]
    wanted = hf.hf_logits(
        reference, [tokens], pixel_values=torch.tensor(pixels),
        token_type_ids=torch.tensor([[int(t == IMAGE) for t in tokens]]),
    )  # fmt: skip
    np.testing.assert_allclose(logits_with_media(model, tokens, features), wanted, rtol=0, atol=1e-4)


def test_an_encoder_without_weights_is_dropped(transformers, tmp_path):
    """Text-only conversions keep the encoders' configurations."""
    from safetensors.numpy import load_file, save_file

    from shared.model_files import ModelFiles
    from workers.load import load

    _, model = gemma4(transformers, tmp_path)
    assert model.has_vision and model.has_audio
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: array for name, array in weights.items() if "vision" not in name and "audio" not in name}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    text_only = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    assert not text_only.has_vision and not text_only.has_audio
    tokens = mx.array([[5, 6, 7]])
    np.testing.assert_array_equal(np.array(text_only(tokens)), np.array(model(tokens)))
