"""The forms in which checkpoints of Idefics3 and SmolVLM come, and what is refused."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from frontend.media.processors import processor_of
from shared.errors import BadModel
from shared.model_files import ModelFiles
from tandem.convert import convert
from tests.support.media_oracle import our_logits
from tests.workers.idefics3 import hf
from workers.load import load
from workers.models.idefics3.config import Idefics3Config

pytestmark = pytest.mark.mlx

PICTURES = (hf.picture(40, 13, 1),)


def loaded(folder):
    return load(ModelFiles(name="m", folder=folder), "float32").model


def image_prompt(reference):
    return hf.prompt(hf.processor(reference), "smolvlm", "See <image>now", PICTURES)


def renamed(name, form):
    """A name of transformers' files in another form."""
    forms = {
        "mlx": {"model.text_model.": "language_model.", "lm_head.": "language_model.lm_head.", "model.": ""},
        "nested": {
            "model.text_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
            "model.vision_model.": "vision_tower.", "model.connector.": "multi_modal_projector.",
        },
    }  # fmt: skip
    old = next(old for old in forms[form] if name.startswith(old))
    return forms[form][old] + name.removeprefix(old)


@pytest.mark.oracle
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("form", ["mlx", "nested"])
def test_mlx_names_and_layout_give_the_same(transformers, tmp_path, form, is_tied):
    reference, model = hf.make(transformers, tmp_path, "smolvlm", tie_word_embeddings=is_tied)
    made = image_prompt(reference)
    weights = load_file(tmp_path / "model.safetensors")
    assert "model.vision_model.embeddings.patch_embedding.weight" in weights
    assert ("lm_head.weight" in weights) != is_tied
    turned = {n: w.transpose(0, 2, 3, 1).copy() if w.ndim == 4 else w for n, w in weights.items()}
    save_file({renamed(n, form): w for n, w in turned.items()}, tmp_path / "model.safetensors", {"format": "mlx"})
    np.testing.assert_array_equal(our_logits(loaded(tmp_path), made), our_logits(model, made))


@pytest.mark.oracle
def test_a_packed_checkpoint_with_mlx_names_agrees_within_its_error(transformers, tmp_path):
    reference, model = hf.make(transformers, tmp_path, "idefics3", {"hidden_size": 64, "intermediate_size": 64})
    made = image_prompt(reference)
    weights = {renamed(n, "mlx"): w for n, w in load_file(tmp_path / "model.safetensors").items()}
    for name, array in list(weights.items()):
        if array.ndim == 4:
            weights[name] = array.transpose(0, 2, 3, 1).copy()
        elif name.startswith("language_model.") and array.ndim == 2:
            packed, scales, biases = mx.quantize(mx.array(array), group_size=32, bits=8)
            base = name.removesuffix("weight")
            weights |= {name: np.array(packed), base + "scales": np.array(scales), base + "biases": np.array(biases)}
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization": {"group_size": 32, "bits": 8}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", {"format": "mlx"})
    wanted, got = our_logits(model, made), our_logits(loaded(tmp_path), made)
    assert 0 < np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.oracle
def test_a_checkpoint_converted_to_8_bits_agrees_within_its_error(transformers, tmp_path):
    text = {"hidden_size": 64, "intermediate_size": 64}
    reference, model = hf.make(transformers, tmp_path / "source", "smolvlm", text)
    convert(str(tmp_path / "source"), tmp_path / "packed", mode="affine", bits=8, group_size=32)
    names = load_file(tmp_path / "packed" / "model.safetensors")
    assert "language_model.model.layers.0.self_attn.q_proj.scales" in names
    assert not any(n.endswith("scales") for n in names if "vision_model" in n or "connector" in n)
    packed = loaded(tmp_path / "packed")
    before, after = (dict(tree_flatten(m.parameters())) for m in (model, packed))
    assert before.keys() == after.keys()
    made = image_prompt(reference)
    wanted, got = our_logits(model, made), our_logits(packed, made)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


@pytest.mark.oracle
def test_a_text_only_conversion_takes_text_only(transformers, tmp_path):
    reference, model = hf.make(transformers, tmp_path, "smolvlm")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: w for n, w in weights.items() if "vision_model" not in n and "connector" not in n}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    text_only = loaded(tmp_path)
    assert (model.modalities, text_only.modalities) == (["image", "video"], [])
    made = hf.prompt(hf.processor(reference), "smolvlm", "A text")
    np.testing.assert_array_equal(our_logits(text_only, made), our_logits(model, made))


@pytest.mark.oracle
def test_what_released_configurations_leave_out_has_transformers_defaults(transformers):
    text = {"hidden_size": 64, "num_key_value_heads": 8, "vocab_size": 99}
    config = {"model_type": "smolvlm", "text_config": text, "vision_config": {"image_size": 96}}
    made = Idefics3Config.from_hf(config, 0)
    theirs = transformers.SmolVLMConfig(text_config={"model_type": "llama", **text}, vision_config={"image_size": 96})
    for ours, wanted in ((made.text, theirs.text_config), (made.vision, theirs.vision_config)):
        for name in ("hidden_size", "intermediate_size"):
            assert getattr(ours, name) == getattr(wanted, name)
        assert ours.num_heads == wanted.num_attention_heads
    assert len(made.text.windows) == theirs.text_config.num_hidden_layers
    assert made.text.rms_norm_eps == theirs.text_config.rms_norm_eps
    assert made.vision.num_layers == theirs.vision_config.num_hidden_layers
    assert (made.vision.patch_size, made.vision.layer_norm_eps) == (32, theirs.vision_config.layer_norm_eps)
    assert made.scale_factor == theirs.scale_factor
    assert not made.text.is_tied


REFUSED = {
    "activation": ({}, {"hidden_act": "gelu"}, {}, "hidden_act 'gelu'"),
    "channels": ({}, {"num_channels": 1}, {}, "num_channels 1"),
    "heads": ({}, {"num_attention_heads": 3}, {}, "3 heads share a width of 16"),
    "two sides": ({}, {"image_size": [16, 16]}, {}, "malformed"),
    "text decoder": ({"model_type": "phi3", "hidden_act": "gelu"}, {}, {}, "hidden_act"),
    "scale": ({}, {}, {"scale_factor": 5}, "scale_factor 5"),
    "scale as text": ({}, {}, {"scale_factor": "two"}, "malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_does_not_compute_is_refused(case):
    text, vision, more, reason = REFUSED[case]
    config = {"model_type": "smolvlm", "text_config": hf.TEXT | text, "vision_config": hf.VISION | vision, **more}
    with pytest.raises(BadModel, match=reason):
        Idefics3Config.from_hf(config, 0)


BAD_SETTINGS = {
    "not resized": ({"do_resize": False}, "not resized"),
    "not rescaled": ({"do_rescale": False}, "not rescaled"),
    "another factor": ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
    "another kind of size": ({"size": {"height": 48, "width": 48}}, "longest_edge"),
    "too large": ({"size": {"longest_edge": 5000}}, "edge of 5000"),
    "half a token": ({"max_image_size": {"longest_edge": 12}}, "whole tokens"),
    "another length": ({"image_seq_len": 169}, "image_seq_len 169, but a tile has 4"),
    "grey": ({"image_mean": [0.5]}, "1 means and 3 deviations"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_the_processor_does_not_compute_are_refused(tmp_path, case):
    changes, reason = BAD_SETTINGS[case]
    config = {"model_type": "idefics3", "text_config": hf.TEXT, "vision_config": hf.VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**hf.IMAGES, "image_seq_len": 4}))
    found = processor_of(tmp_path)
    assert (found.placeholders, found.num_tile_tokens) == ({"image": 128_257}, 4)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**hf.IMAGES, **changes}))
    with pytest.raises(BadModel, match=reason):
        processor_of(tmp_path)


def test_a_configuration_without_an_encoder_takes_text_only(tmp_path):
    config = {"model_type": "smolvlm", "text_config": hf.TEXT}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert processor_of(tmp_path) is None
    assert Idefics3Config.from_hf(config, 0).vision is None


def test_the_placeholder_is_found_under_its_older_name(tmp_path):
    config = {"model_type": "smolvlm", "image_token_index": 7, "text_config": hf.TEXT, "vision_config": hf.VISION}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hf.IMAGES))
    assert processor_of(tmp_path).placeholders == {"image": 7}
