"""Mistral 3 and Pixtral against transformers: features of images, logits of text and images."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from tests.support.media_oracle import arrays_of, normalised, our_logits
from tests.workers.mistral3 import hf
from workers.models.mistral3 import vision as encoder

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CASES = {
    "mistral3": ("mistral3", {}, {}, {}),
    "mistral3, an inner layer, biases, three patches a side": (
        "mistral3", {"sliding_window": 8, "rms_norm_eps": 0.01}, {"hidden_act": "silu"},
        {"vision_feature_layer": -2, "multimodal_projector_bias": True, "spatial_merge_size": 3,
         "projector_hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": False},
    ),
    "ministral3 tied": (
        "mistral3", {**hf.MINISTRAL, "tie_word_embeddings": True}, {"num_attention_heads": 2},
        {"tie_word_embeddings": True, "spatial_merge_size": 1},
    ),
    "ministral3, another base": (
        "mistral3", hf.MINISTRAL, {"rope_parameters": {"rope_type": "axial", "rope_theta": 50.0}},
        {"tie_word_embeddings": False, "vision_feature_layer": 2},
    ),
    "pixtral": ("llava", {}, {"hidden_act": "silu"}, {}),
    "pixtral, three layers, no biases": (
        "llava", {"model_type": "llama"}, {},
        {"vision_feature_layer": [0, -2, 3], "multimodal_projector_bias": False, "projector_hidden_act": "silu"},
    ),
}  # fmt: skip
WORDS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]


@pytest.fixture(scope="module", params=CASES)
def pair(request, transformers, tmp_path_factory):
    model_type, text, vision, more = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    reference, model = hf.make(transformers, folder, model_type, text, vision, **more)
    return reference, model, hf.processor(folder)


def contents(made):
    """Images of different sizes, smaller and larger than the encoder's; the tall one is one token wide."""
    wide, tall = hf.item(made, 45, 21, 1), hf.item(made, 4, 60, 2)
    return {
        "text": [WORDS[0] * 6, WORDS[1]],
        "image": [WORDS[0], wide, WORDS[1]],
        "two images": [wide, WORDS[0], tall, WORDS[2]],
    }


def test_features_equal_transformers(pair):
    import torch

    reference, model, made = pair
    asked = hf.prompt(made, contents(made)["two images"])
    with torch.no_grad():
        wanted = reference.model.get_image_features(**hf.hf_inputs(asked), return_dict=True).pooler_output
    assert len(wanted) == 2
    for media, rows in zip(asked.media, wanted, strict=True):
        image = np.array(model.encode_image(mx.array(normalised(media))))
        np.testing.assert_allclose(image.reshape(-1, 32), rows.numpy(), rtol=0, atol=1e-4)
        assert rows.abs().max() > 0.1
        inside = hf.prompt(made, [media]).tokens[:-1]
        given = np.array(model.encode_media(arrays_of(media), media.grid, "image"))[0]
        is_image = np.array(inside) == hf.IMAGE
        assert len(given) == media.num_tokens == len(inside)
        np.testing.assert_allclose(given[is_image], rows.numpy(), rtol=0, atol=1e-4)
        breaks = np.array(model.embed(mx.array([hf.BREAK])))
        np.testing.assert_array_equal(given[~is_image], np.repeat(breaks, sum(~is_image), axis=0))


def test_a_nearly_grey_image_is_normed_as_in_transformers(pair):
    """Where the norms' epsilon is as large as what they see."""
    import torch

    reference, model, made = pair
    pixels = normalised(hf.item(made, 45, 21, 1)) * np.float32(0.01)
    inputs = {"pixel_values": torch.tensor(pixels.transpose(2, 0, 1)[None]), "image_sizes": [pixels.shape[:2]]}
    with torch.no_grad():
        wanted = reference.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
    image = np.array(model.encode_image(mx.array(pixels)))
    np.testing.assert_allclose(image.reshape(-1, 32), wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("content", ["text", "image", "two images"])
def test_logits_equal_transformers(pair, content):
    reference, model, made = pair
    asked = hf.prompt(made, contents(made)[content])
    wanted = hf.hf_logits(reference, asked)
    np.testing.assert_allclose(our_logits(model, asked), wanted, rtol=0, atol=1e-4)
    first = asked.media[0] if asked.media else None
    cuts = [2, 5] if first is None else [first.start + 1, first.start + first.num_tokens // 2]
    np.testing.assert_allclose(our_logits(model, asked, cuts), wanted, rtol=0, atol=1e-4)


def test_queries_in_parts_attend_as_together(pair, monkeypatch):
    _, model, made = pair
    pixels = mx.array(normalised(hf.item(made, 45, 21, 1)))
    whole = np.array(model.encode_image(pixels))
    monkeypatch.setattr(encoder, "MAX_QUERIES", 7)
    np.testing.assert_allclose(np.array(model.encode_image(pixels)), whole, rtol=0, atol=1e-5)
