"""Idefics3 and SmolVLM against transformers: positions, encoder rows, logits of text and images."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.media_oracle import our_logits
from tests.workers.idefics3 import hf
from workers.models.siglip import grid_positions

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

WHOLE = {"do_image_splitting": False}
CASES = {
    "smolvlm": ("smolvlm", {}, {}, {}, {}),
    "idefics3, three patches a side, as many kv heads, biased": (
        "idefics3", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"image_size": 24, "layer_norm_eps": 1e-3}, {"scale_factor": 3}, {"max_image_size": {"longest_edge": 24}},
    ),
    "smolvlm tied, tiles larger than the square of positions, head size of its own": (
        "smolvlm", {"head_dim": 12}, {}, {"tie_word_embeddings": True, "scale_factor": 4},
        {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 64}},
    ),
    "idefics3, tiles smaller than it, llama 3's rotation, no normalisation": (
        "idefics3",
        {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }}, {"image_size": 24}, {}, {"do_normalize": False},
    ),
    "smolvlm, pixels that fill no patch, other colours, the whole only": (
        "smolvlm", {}, {"image_size": 18}, {},
        {**WHOLE, "max_image_size": {"longest_edge": 18}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
    ),
}  # fmt: skip
TEXTS = {
    "text": ("A text only.", ()),
    "image": ("See <image>now", (hf.picture(40, 13, 1),)),
    "two images": ("<image>\nand <image>", (hf.picture(40, 13, 1), hf.picture(11, 29, 2))),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, transformers, tmp_path_factory):
    model_type, text, vision, more, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("model")
    reference, model = hf.make(transformers, folder, model_type, text, vision, **more)
    return model_type, settings, reference, model


@pytest.mark.parametrize(
    ("side", "rows", "columns"), [(26, 26, 26), (27, 27, 27), (32, 32, 32), (4, 8, 6), (6, 4, 2), (5, 3, 7)]
)
def test_positions_equal_those_of_transformers(transformers, side, rows, columns):
    """The released models' grids, and some that are not as large as the square of positions."""
    import torch

    vision = transformers.models.idefics3.modeling_idefics3
    config = vision.Idefics3VisionConfig(hidden_size=1, num_attention_heads=1, image_size=side, patch_size=1)
    embeddings = vision.Idefics3VisionEmbeddings(config)
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        found = embeddings(torch.zeros(1, 3, rows, columns), torch.ones(1, rows, columns, dtype=torch.bool))
    np.testing.assert_array_equal(grid_positions(rows, columns, side), found[0, :, 0].numpy().astype(int))


def test_encoder_rows_equal_transformers_beside_padding(case):
    """Images of a batch are padded with empty ones there; ours know nothing of them."""
    import torch

    model_type, settings, reference, model = case
    made = hf.prompt(hf.processor(reference, settings), model_type, *TEXTS["two images"])
    pixels = hf.hf_inputs(made)["pixel_values"]
    padded = torch.cat([pixels, torch.zeros_like(pixels[:, :2])], dim=1)
    mask = torch.ones_like(padded[:, :, 0])
    with torch.no_grad():
        found = reference.model.get_image_features(padded, mask, return_dict=True).pooler_output
    (wanted,) = found
    wanted = wanted.numpy().reshape(len(made.media), -1, wanted.shape[-1])
    rows = np.stack([hf.rows_of(model, media) for media in made.media])
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-4)
    assert np.abs(rows[0] - rows[-1]).max() > 1e-2, "tiles that cannot be told apart"


@pytest.mark.parametrize("content", TEXTS)
def test_logits_equal_transformers(case, content):
    model_type, settings, reference, model = case
    made = hf.prompt(hf.processor(reference, settings), model_type, *TEXTS[content])
    wanted = hf.hf_logits(reference, made)
    np.testing.assert_allclose(our_logits(model, made), wanted, rtol=0, atol=1e-4)
    at = [m.start + 1 for m in made.media][-2:] or [len(made.tokens) // 2]  # inside a tile
    np.testing.assert_allclose(our_logits(model, made, at), wanted, rtol=0, atol=1e-4)
