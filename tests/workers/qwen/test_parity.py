"""Qwen-VL models against transformers: encoder rows, logits of text, images and video, greedy text."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.media_oracle import our_logits
from tests.workers.qwen import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CASES = {
    "qwen2_vl": ("qwen2_vl", {}, {}, {}),
    "qwen2_vl tied, gelu": ("qwen2_vl", {}, {"hidden_act": "gelu"}, {"tie_word_embeddings": True}),
    "qwen2_5_vl": ("qwen2_5_vl", {}, {}, {}),
    "qwen2_5_vl larger windows": ("qwen2_5_vl", {}, {"window_size": 24, "fullatt_block_indexes": [0, 2]}, {}),
    "qwen3_vl": ("qwen3_vl", {}, {}, {}),
    "qwen3_vl biased, no deep layers, as many kv heads": (
        "qwen3_vl", {"attention_bias": True, "num_key_value_heads": 4}, {"deepstack_visual_indexes": []}, {},
    ),
    "qwen3_vl tied": ("qwen3_vl", {}, {"hidden_act": "silu"}, {"tie_word_embeddings": True}),
    "qwen3_vl_moe": ("qwen3_vl_moe", {}, {}, {}),
    "qwen3_vl_moe tied, some layers without experts, one expert a token": (
        "qwen3_vl_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "num_experts_per_tok": 1},
        {}, {"tie_word_embeddings": True},
    ),
    "qwen3_5": ("qwen3_5", {}, {}, {}),
    "qwen3_5 tied, biased, a quarter turns, every second layer attends": (
        "qwen3_5",
        {"attention_bias": True, "full_attention_interval": 2, "head_dim": 24, "tie_word_embeddings": True,
         "rope_parameters": {
             "rope_type": "default", "rope_theta": 5_000.0, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.25,
         }},
        {"hidden_act": "silu"}, {"tie_word_embeddings": True},
    ),
    "qwen3_5 yarn": (
        "qwen3_5", {"rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10_000.0,
            "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
        }}, {}, {},
    ),
    "qwen3_5_moe": ("qwen3_5_moe", {}, {}, {}),
}  # fmt: skip
WORDS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


def contents(model_type, config):
    """Prompts of every kind; images of different sizes that windows and learned positions do not divide evenly."""
    first = hf.item("image", hf.image(24, 40, 1)[None], config)
    second = hf.item("image", hf.image(56, 16, 2)[None], config)
    frames = np.stack([hf.image(24, 24, s) for s in (3, 4, 5, 6)])
    # Qwen3-VL's prompts name each pair of frames' time, so that a pair is an item of its own.
    if model_type in hf.NAMES_TIMES:
        pairs = [hf.item("video", frames[i : i + 2], config) for i in (0, 2)]
        video = [WORDS[0], pairs[0], [20, 21], pairs[1], WORDS[1]]
    else:
        video = [WORDS[0], hf.item("video", frames, config, 1.5), WORDS[1]]
    return {
        "text": [WORDS[0], WORDS[1]],
        "image": [WORDS[0], first, WORDS[1]],
        "two images": [WORDS[0], first, WORDS[1], second, WORDS[2]],
        "video": video,
    }


@pytest.fixture(scope="module", params=CASES)
def pair(request, transformers, tmp_path_factory):
    model_type, text, vision, more = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    return model_type, *hf.make(transformers, folder, model_type, text, vision, **more)


def test_encoder_rows_equal_transformers(pair):
    import torch

    model_type, reference, model = pair
    made = hf.prompt(contents(model_type, model.config.vision)["two images"])
    inputs = hf.hf_inputs(model, made)
    with torch.no_grad():
        output = reference.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    wanted = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    at = 0
    for media in made.media:
        rows = model.vision_tower(hf.patches_of(model, media), tuple(media.grid))
        assert rows.shape == (len(wanted), media.num_tokens, 32)
        for got, expected in zip(rows, wanted, strict=True):
            np.testing.assert_allclose(np.array(got), expected[at : at + media.num_tokens].numpy(), rtol=0, atol=1e-4)
        at += media.num_tokens
    assert at == len(wanted[0])


@pytest.mark.parametrize("content", ["text", "image", "two images", "video"])
def test_logits_equal_transformers(pair, content):
    model_type, reference, model = pair
    made = hf.prompt(contents(model_type, model.config.vision)[content])
    if content == "video" and model_type in hf.NAMES_TIMES:
        # transformers takes one grid for the whole video and splits it.
        whole = hf.hf_inputs(model, made)
        assert whole["video_grid_thw"].tolist() == [[1, 6, 6], [1, 6, 6]]
    wanted = hf.hf_logits(reference, model, made)
    np.testing.assert_allclose(our_logits(model, made), wanted, rtol=0, atol=1e-4)
    cuts = [len(made.tokens) // 3, len(made.tokens) // 2]  # inside an image, where there is one
    np.testing.assert_allclose(our_logits(model, made, cuts), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", list(hf.TEXTS))
def test_pixels_equal_those_of_transformers(transformers, tmp_path, model_type):
    """Our resizing and patches against the reference's, for images that grow, shrink and keep their size."""
    from PIL import Image

    _, model = hf.make(transformers, tmp_path, model_type)
    config = model.config.vision
    ours = hf.processor(config)
    reference = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    for width, height in ((3, 5), (40, 24), (301, 77), (1000, 999)):
        picture = Image.fromarray(hf.image(width, height, width))
        processed = ours.image(picture)
        wanted = reference(images=[picture], return_tensors="np")
        assert processed.grid == wanted["image_grid_thw"][0].tolist()
        assert processed.num_tokens * 4 == len(wanted["pixel_values"])
        got = model.vision_tower.patches(
            mx.array(processed.arrays["frames"]), mx.array(processed.arrays["mean"]), mx.array(processed.arrays["std"])
        )
        np.testing.assert_allclose(np.array(got), wanted["pixel_values"], rtol=0, atol=1e-6)
