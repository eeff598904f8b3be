"""MiniCPM-V models against transformers: encoder rows, logits of text and images, in one piece and in chunks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.media_oracle import our_logits
from tests.workers.minicpm_v import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CASES = {
    "plain": ({}, {}, {}),
    "a head of its own, merged behind the last layer, attention seldom": (
        {"full_attention_interval": 4, "tie_word_embeddings": True}, {"layer_norm_eps": 1e-3, "image_size": 16},
        {"tie_word_embeddings": False, "insert_layer_id": 2},
    ),
    "four times the tokens": ({"attention_bias": True, "num_key_value_heads": 4}, {}, {"downsample_mode": "4x"}),
    "two rounds of merges, merged behind the first layer": (
        {"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3}, {"image_size": 28},
        {"merger_times": 2, "insert_layer_id": 0},
    ),
    "three rounds of merges and none in the encoder, another rotation": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
        {"image_size": 4}, {"merger_times": 3, "downsample_mode": "4x"},
    ),
}  # fmt: skip
CONTENTS = {"text": "Only a text", "image": "See @now", "two images": "One @two\n@."}
PICTURES = [hf.picture(40, 30, 1), hf.picture(11, 29, 2)]


@pytest.fixture(scope="module", params=CASES)
def case(request, transformers, tmp_path_factory):
    """(transformers' model, ours, the frontend's processor)"""
    text, vision, more = CASES[request.param]
    reference, model = hf.make(transformers, tmp_path_factory.mktemp("model"), text, vision, **more)
    mode = {"downsample_mode": more.get("downsample_mode", "16x")}
    return reference, model, hf.processor({**mode, "max_slice_nums": 2}, vision, **more)


def test_encoder_rows_equal_transformers(case):
    reference, model, made = case
    media = hf.prompt(made, "@@@", [*PICTURES, hf.picture(90, 8, 3)]).media
    grids = {tuple(part.grid) for part in media}
    assert len(media) > 3 and len(grids) > 2
    for part, rows in zip(media, hf.hf_features(reference, media), strict=True):
        got = hf.encoded(model, part)
        assert got.shape == (part.num_tokens, hf.HIDDEN)
        np.testing.assert_allclose(got, rows, rtol=0, atol=1e-4)
        assert np.abs(rows).max() > 0.1, "rows that tell nothing"


@pytest.mark.parametrize("content", CONTENTS)
def test_logits_equal_transformers(case, content):
    reference, model, made = case
    text = CONTENTS[content]
    asked = hf.prompt(made, text, PICTURES[: text.count("@")])
    wanted = hf.hf_logits(reference, asked)
    np.testing.assert_allclose(our_logits(model, asked), wanted, rtol=0, atol=1e-4)
    if content == "text":
        np.testing.assert_allclose(np.array(model(mx.array([asked.tokens])))[0], wanted, rtol=0, atol=1e-4)
        cuts = [3, 5]
    else:
        item = max(asked.media, key=lambda part: part.num_tokens)
        cuts = [item.start + 1, item.start + item.num_tokens + 1]  # inside an image, where it has several tokens
    np.testing.assert_allclose(our_logits(model, asked, cuts), wanted, rtol=0, atol=1e-4)
