"""LFM2-VL models against transformers: encoder rows, logits of text and images, in one piece and in chunks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.media_oracle import our_logits
from tests.workers.lfm2_vl import hf
from workers.models.lfm2_vl.vision import resampling

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CASES = {
    "plain": ({}, {}, {}),
    "a head of its own, no norm and no biases in the projector": (
        {}, {}, {"tie_word_embeddings": False, "projector_use_layernorm": False, "projector_bias": False},
    ),
    "biased and longer convolutions, width as given, another rotation, a pooling head": (
        {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "num_key_value_heads": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"vision_use_head": True}, {"projector_hidden_act": "gelu_pytorch_tanh"},
    ),
    "attention first, squares of three, one position": (
        {"layer_types": ["full_attention", "conv", "conv", "full_attention"]},
        {"num_patches": 1, "layer_norm_eps": 1e-3}, {"downsample_factor": 3, "projector_hidden_act": "silu"},
    ),
    "attention by index, a wider MLP": (
        {"layer_types": None, "full_attn_idxs": [1, 2], "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 20},
        {"num_patches": 64}, {"projector_hidden_act": "quick_gelu"},
    ),
}  # fmt: skip
WORDS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


def contents(merge_size):
    """Grids that grow and shrink the square of positions, in one direction each and in both."""
    side = hf.PATCH * merge_size
    first, second = (hf.item(hf.image(c * side, r * side, r), merge_size) for r, c in ((2, 4), (5, 1)))
    return {
        "text": [WORDS[0], WORDS[1]],
        "image": [WORDS[0], first, WORDS[1]],
        "two images": [WORDS[0], first, WORDS[1], second, WORDS[2]],
    }


@pytest.fixture(scope="module", params=CASES)
def pair(request, transformers, tmp_path_factory):
    text, vision, more = CASES[request.param]
    return hf.make(transformers, tmp_path_factory.mktemp("model"), text, vision, **more)


def test_encoder_rows_equal_transformers(pair):
    reference, model = pair
    merge_size = model.model.config.vision.merge_size
    media = hf.prompt(contents(merge_size)["two images"]).media
    media.append(hf.item(hf.image(1 * 4 * merge_size, 1 * 4 * merge_size, 9), merge_size))
    wanted = hf.hf_features(reference, media)
    for part, rows in zip(media, wanted, strict=True):
        got = hf.encoded(model, part)
        assert got.shape == (part.num_tokens, hf.HIDDEN)
        np.testing.assert_allclose(got, rows, rtol=0, atol=1e-4)


@pytest.mark.parametrize("content", ["text", "image", "two images"])
def test_logits_equal_transformers(pair, content):
    reference, model = pair
    made = hf.prompt(contents(model.model.config.vision.merge_size)[content])
    wanted = hf.hf_logits(reference, made)
    np.testing.assert_allclose(our_logits(model, made), wanted, rtol=0, atol=1e-4)
    if content == "text":
        np.testing.assert_allclose(np.array(model(mx.array([made.tokens])))[0], wanted, rtol=0, atol=1e-4)
    cuts = [len(made.tokens) // 3, len(made.tokens) // 2]  # inside an image, where there is one
    np.testing.assert_allclose(our_logits(model, made, cuts), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (1, 40), (7, 23), (13, 3), (3, 5)])
def test_positions_are_resampled_as_by_pytorch(grid):
    import torch

    table = np.random.default_rng(0).standard_normal((16, 16, 8)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None], grid, mode="bilinear", antialias=True
    )[0].permute(1, 2, 0)
    down, across = (resampling(16, length) for length in grid)
    got = np.einsum("rs,stc,kt->rkc", down, table, across)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=2e-6)
