"""The forms in which Mistral 3 and Pixtral come: names of transformers and MLX, 8-bit floats, packed, text only."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from shared.errors import BadModel
from shared.model_files import ModelFiles
from tandem.convert import convert
from tests.support.media_oracle import normalised, our_logits
from tests.workers.mistral3 import hf
from tests.workers.tiny_architectures import BASE, RUNS
from workers.load import load
from workers.load.servable import examine
from workers.models.mistral3.config import Mistral3Config
from workers.models.mistral3.model import Mistral3
from workers.models.mlxlm import MlxLmModel
from workers.models.own import own_of

pytestmark = pytest.mark.mlx


def loaded(folder):
    return load(ModelFiles(name="m", folder=folder), "float32").model


def question(made):
    return hf.prompt(made, [[5, 6], hf.item(made, 40, 24), [7, 8]])


def rewrite(folder, change=lambda config: config, rename=lambda weights: weights, written_by="pt"):
    """The folder's configuration and weights in another form."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    weights = load_file(folder / "model.safetensors")
    save_file(rename(weights), folder / "model.safetensors", {"format": written_by})


def bare(name):
    """A tensor's name in transformers' files as (part of the model, name inside)."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return "language_model", name
    part, _, inner = name.partition(".")
    if part == "language_model" and not inner.startswith(("model.", "lm_head.")):
        inner = f"model.{inner}"
    return part, inner


def older(weights):
    """transformers 4"""
    return {".".join(bare(name)): weight for name, weight in weights.items()}


def newer(weights):
    """transformers 5"""
    made = {}
    for name, weight in weights.items():
        part, inner = bare(name)
        is_body = part == "language_model" and inner.startswith("model.")
        inner = inner.removeprefix("model.") if is_body else inner
        made[inner if inner.startswith("lm_head.") else f"model.{part}.{inner}"] = weight
    return made


def mlx_named(weights):
    made = {}
    for name, weight in weights.items():
        part, inner = bare(name)
        inner = f"vision_model.{inner}" if part == "vision_tower" else inner
        made[f"{part}.{inner}"] = np.ascontiguousarray(weight.transpose(0, 2, 3, 1)) if weight.ndim == 4 else weight
    rotary = "vision_tower.vision_model.patch_positional_embedding.inv_freq"
    return made | {rotary: np.ones(4, np.float32)}


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["mistral3", "llava"])
@pytest.mark.parametrize("is_tied", [False, True], ids=["own head", "tied"])
def test_names_of_every_writer_give_the_same(transformers, tmp_path, model_type, is_tied):
    _, model = hf.make(
        transformers, tmp_path, model_type, {"tie_word_embeddings": is_tied}, tie_word_embeddings=is_tied
    )
    assert isinstance(model, Mistral3) and ("lm_head" in model.language_model) != is_tied
    asked = question(hf.processor(tmp_path))
    expected = our_logits(model, asked)
    forms = {"older": older, "newer": newer, "mlx": mlx_named}
    for name, form in forms.items():
        is_mlx = name == "mlx"

        def as_written(config, is_mlx=is_mlx):
            config = (
                {k: v for k, v in config.items() if k != "tie_word_embeddings"} if model_type != "llava" else config
            )
            return config | {"model_type": "pixtral"} if is_mlx and model_type == "llava" else config

        rewrite(tmp_path, as_written, form, name)
        names = set(load_file(tmp_path / "model.safetensors"))
        assert ("vision_tower.ln_pre.weight" in names) == (name == "older")
        assert ("model.language_model.norm.weight" in names) == (name == "newer")
        np.testing.assert_array_equal(our_logits(loaded(tmp_path), asked), expected, err_msg=name)


@pytest.mark.oracle
def test_a_missing_head_is_the_embedding_unless_the_configuration_says_that_there_is_one(transformers, tmp_path):
    hf.make(transformers, tmp_path, "mistral3", {"tie_word_embeddings": True}, tie_word_embeddings=True)

    def said(config, outer, inner):
        text = {k: v for k, v in config["text_config"].items() if k != "tie_word_embeddings"} | inner
        return {k: v for k, v in config.items() if k != "tie_word_embeddings"} | {"text_config": text} | outer

    for outer, inner in (({}, {}), ({}, {"tie_word_embeddings": True}), ({"tie_word_embeddings": True}, {})):
        rewrite(tmp_path, lambda config, outer=outer, inner=inner: said(config, outer, inner))
        assert "lm_head" not in loaded(tmp_path).language_model
    rewrite(tmp_path, lambda config: said(config, {}, {"tie_word_embeddings": False}))
    with pytest.raises(BadModel, match="lm_head"):
        loaded(tmp_path)


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["mistral3", "pixtral"])
def test_a_text_only_conversion_takes_text_only(transformers, tmp_path, model_type):
    _, model = hf.make(transformers, tmp_path, "mistral3" if model_type == "mistral3" else "llava")
    rewrite(
        tmp_path, lambda config: config | {"model_type": model_type},
        lambda weights: {n: w for n, w in older(weights).items() if n.startswith("language_model.")},
    )  # fmt: skip
    text_only = loaded(tmp_path)
    assert (model.modalities, text_only.modalities) == (["image"], [])
    tokens = mx.array([[5, 6, 7]])
    np.testing.assert_array_equal(np.array(text_only(tokens)), np.array(model(tokens)))
    rewrite(tmp_path, lambda config: {k: v for k, v in config.items() if k != "vision_config"})
    assert loaded(tmp_path).modalities == []


@pytest.mark.oracle
def test_a_configuration_of_few_fields_means_what_it_means_to_transformers(transformers, tmp_path):
    """The published Pixtral names hardly any size; the rest are defaults."""
    from workers.models.mistral3.vision import VisionTower

    small = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "intermediate_size": 8, "head_dim": 4}
    config = {
        "model_type": "llava", "image_token_index": 10, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "text_config": {**small, "model_type": "mistral"},
        "vision_config": {"head_dim": 64, "hidden_act": "silu", "image_size": 1024, "model_type": "pixtral",
                          "patch_size": 16, "rope_theta": 10_000.0},
    }  # fmt: skip
    ours = Mistral3Config.from_hf(config, 0)
    theirs = transformers.LlavaConfig(**{k: v for k, v in config.items() if k != "model_type"})
    text, vision = theirs.text_config, theirs.vision_config
    assert (ours.text.num_heads, ours.text.num_kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert set(ours.text.windows) == {text.sliding_window} and ours.text.rms_norm_eps == text.rms_norm_eps
    found = ours.vision
    assert (found.hidden_size, found.intermediate_size, found.num_layers, found.num_heads, found.activation) == (
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads, "silu",
    )  # fmt: skip
    assert ours.projector.has_bias == theirs.multimodal_projector_bias
    assert ours.projector.activation == theirs.projector_hidden_act
    assert found.feature_layers == (24,) and VisionTower(found).patch_conv.weight.shape == (1024, 16, 16, 3)
    for text_type in ("mistral", "ministral3"):
        minimal = {
            **small,
            "head_dim": None,
            "model_type": text_type,
            "rope_parameters": hf.MINISTRAL["rope_parameters"],
        }
        if text_type == "ministral3":
            del minimal["head_dim"]
        made = Mistral3Config.from_hf({"model_type": "mistral3", "text_config": minimal, "vision_config": {}}, 0)
        theirs = transformers.Mistral3Config(text_config=minimal, vision_config={"model_type": "pixtral"})
        assert made.text.rms_norm_eps == theirs.text_config.rms_norm_eps
        assert made.text.head_dim == (theirs.text_config.head_dim or 64 // 32)
        assert set(made.text.windows) == {theirs.text_config.sliding_window}
        assert (made.vision.patch_size, made.projector.merge_size) == (16, theirs.spatial_merge_size)
        assert made.projector.has_bias == theirs.multimodal_projector_bias


@pytest.mark.oracle
def test_matrices_of_8_bit_floats_are_what_they_stand_for(transformers, tmp_path):
    """Ministral 3 as published: text matrices of 8 bits with a scale each, and scales of activations."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    source = tmp_path / "source"
    reference, _ = hf.make(transformers, source, "mistral3", hf.MINISTRAL)
    made, plain = {}, {}
    for name, weight in load_torch(source / "model.safetensors").items():
        is_packed = name.endswith("_proj.weight") and "vision" not in name and "projector" not in name
        made[name] = weight
        if not is_packed:
            continue
        scale = (weight.abs().max() / 448).bfloat16()
        made[name] = (weight / scale.float()).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = scale
        made[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(0.02)
        plain[name] = (made[name].float() * scale.float()).bfloat16().float()
    assert len(plain) == 3 * 7
    save_torch(made, source / "model.safetensors", {"format": "pt"})
    rewritten = json.loads((source / "config.json").read_text())
    rewritten["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    (source / "config.json").write_text(json.dumps(rewritten))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            for stored, weight in plain.items():
                if ".".join(bare(stored)) == ".".join(bare(name)):
                    parameter.copy_(weight)
    asked = question(hf.processor(source))
    expected = hf.hf_logits(reference, asked)
    np.testing.assert_allclose(our_logits(loaded(source), asked), expected, rtol=0, atol=1e-4)
    for name, how in (("plain", {"dtype": "float32"}), ("packed", {"bits": 8, "group_size": 32})):
        convert(str(source), tmp_path / name, **how)
        told = json.loads((tmp_path / name / "config.json").read_text())
        assert (told.get("quantization_config") or {}).get("quant_method") != "fp8"
        tolerance = 1e-4 if name == "plain" else 0.05 * np.abs(expected).max()
        np.testing.assert_allclose(our_logits(loaded(tmp_path / name), asked), expected, rtol=0, atol=tolerance)


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["mistral3", "llava"])
def test_a_packed_conversion_sees_as_its_source(transformers, tmp_path, model_type):
    _, model = hf.make(transformers, tmp_path / "source", model_type, hf.MINISTRAL)
    done = convert(str(tmp_path / "source"), tmp_path / "packed", bits=8, group_size=32)
    assert done.num_encoder_tensors > 10 and not done.is_text_only
    packed = loaded(tmp_path / "packed")
    made = hf.processor(tmp_path / "packed")
    pixels = mx.array(normalised(hf.item(made, 40, 24)))
    np.testing.assert_array_equal(np.array(packed.encode_image(pixels)), np.array(model.encode_image(pixels)))
    asked = question(made)
    expected = our_logits(model, asked)
    difference = np.abs(our_logits(packed, asked) - expected).max()
    assert 0 < difference < 0.02 * np.abs(expected).max()


def test_mlx_weights_with_a_packed_encoder_load(tmp_path):
    """Some conversions pack the encoder and the projector, too."""
    vision = {**hf.VISION, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**hf.TEXT, "intermediate_size": 64}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": vision, "image_token_index": hf.IMAGE}
    mx.random.seed(3)
    model = Mistral3(Mistral3Config.from_hf(config, 0))
    nn.quantize(
        model, group_size=32, bits=4,
        class_predicate=lambda path, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0,
    )  # fmt: skip
    weights = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    packed = [name for name in weights if name.endswith(".scales")]
    assert any("vision_tower" in name for name in packed) and any("merging_layer" in name for name in packed)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): w for name, w in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": {"group_size": 32, "bits": 4}}))
    pixels = mx.random.normal((24, 40, 3))
    other = loaded(tmp_path)
    np.testing.assert_allclose(
        np.array(other.encode_image(pixels)), np.array(model.encode_image(pixels)), rtol=0, atol=1e-4
    )


REFUSED = {
    "activation": ({}, {"hidden_act": "relu"}, "'relu'"),
    "projector": ({"projector_hidden_act": "tanh"}, {}, "'tanh'"),
    "rope": ({}, {"rope_parameters": {"rope_type": "linear"}}, "'linear' of the image encoder"),
    "channels": ({}, {"num_channels": 1}, "1 channels"),
    "sizes": ({}, {"num_attention_heads": 5}, "sizes"),
    "head": ({}, {"head_dim": 9}, "sizes"),
    "layer": ({"vision_feature_layer": 4}, {}, "vision_feature_layer"),
    "layers": ({"vision_feature_layer": [1, 2]}, {}, "several"),
    "merge": ({"spatial_merge_size": 0}, {}, "spatial_merge_size 0"),
    "patch": ({}, {"patch_size": [4, 4]}, "malformed"),
    "first patch dropped": ({"model_type": "llava"}, {}, "'default' is not supported"),
    "text": ({"text_config": {**hf.TEXT, "hidden_act": "gelu"}}, {}, "hidden_act 'gelu'"),
    "text sizes": ({"text_config": {"model_type": "mistral"}}, {}, "missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case):
    more, vision, reason = REFUSED[case]
    config = {"model_type": "mistral3", "text_config": hf.TEXT, "vision_config": {**hf.VISION, **vision}, **more}
    assert own_of(config).model is Mistral3
    with pytest.raises(BadModel, match=reason):
        Mistral3Config.from_hf(config, 0)


CLIP = {"model_type": "clip_vision_model"}
SERVED_BY_MLX_LM = {
    "Mistral Small 4": ("mistral3", {**BASE, **RUNS["mistral4"], "model_type": "mistral4"}, hf.VISION),
    "Llava with CLIP": ("llava", hf.TEXT, CLIP),
    "Llava that does not name its encoder": ("llava", hf.TEXT, {}),
    "another decoder": ("pixtral", {**hf.TEXT, "model_type": "other"}, hf.VISION),
}


@pytest.mark.parametrize("case", SERVED_BY_MLX_LM)
def test_what_was_served_as_text_by_mlx_lm_still_is(tmp_path, case):
    from workers.load.folder import mlx_lm_classes

    model_type, text, vision = SERVED_BY_MLX_LM[case]
    config = {"model_type": model_type, "text_config": text, "vision_config": vision, "image_token_index": hf.IMAGE}
    assert own_of(config) is None
    model_class, args = mlx_lm_classes(config)
    model = model_class(args.from_dict(json.loads(json.dumps(config))))
    weights = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    save_file(weights, tmp_path / "model.safetensors", {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = loaded(tmp_path)
    assert isinstance(found, MlxLmModel) and not hasattr(found, "modalities")
    tokens = mx.array([[5, 6, 7]])
    np.testing.assert_allclose(np.array(found(tokens)), np.array(model(tokens)), rtol=0, atol=1e-4)
    assert hf.processor(tmp_path) is None


def test_what_can_be_served_is_told_without_weights(tmp_path):
    config = {"model_type": "mistral3", "text_config": hf.TEXT, "vision_config": {**hf.VISION, "hidden_act": "relu"}}
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "model.safetensors", {"format": "mlx"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = examine(ModelFiles(name="m", folder=tmp_path))
    assert found.architecture == "mistral3" and "'relu'" in found.refusal
