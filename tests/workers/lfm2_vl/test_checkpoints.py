"""The forms in which LFM2-VL's checkpoints come: of the first release and later ones, MLX's, packed, text alone."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from shared.errors import BadModel
from tandem.convert import convert
from tests.support.media_oracle import our_logits
from tests.workers.lfm2_vl import hf
from workers.models.lfm2_vl.config import Lfm2VlConfig

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

MADE = hf.prompt([[5, 6], hf.item(hf.image(24, 40)), [7, 8]])


@pytest.fixture(scope="module")
def source(transformers, tmp_path_factory):
    """(our model, configuration, weights by transformers' names); widths that groups of 32 divide."""
    folder = tmp_path_factory.mktemp("source")
    _, model = hf.make(
        transformers, folder, {"hidden_size": 64, "block_multiple_of": 32},
        {"hidden_size": 32, "intermediate_size": 64}, projector_hidden_size=64,
    )  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"model"}, "the head is the embedding"
    return model, json.loads((folder / "config.json").read_text()), weights


def write(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def of_transformers_4(name):
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def of_the_first_release(name):
    return (
        of_transformers_4(name)
        .replace("vision_model.e", "vision_model.vision_e")
        .replace("vision_model.post", "vision_model.vision_post")
    )


def of_mlx(name):
    return name.removeprefix("model.").replace("language_model.", "language_model.model.")


def channels_last(weights):
    return {n: w.transpose(0, 2, 1).copy() if n.endswith("conv.conv.weight") else w for n, w in weights.items()}


def without(weights, part):
    return {name: weight for name, weight in weights.items() if part not in name}


# As LiquidAI wrote it before transformers knew the model.
FIRST_RELEASE = {
    "model_type": "lfm2-vl", "image_token_index": hf.IMAGE, "vision_feature_layer": -1, "encoder_patch_size": hf.PATCH,
    "use_image_special_tokens": True,
}  # fmt: skip
OLDER_TEXT = {
    "block_dim": 64, "block_ff_dim": 48, "num_heads": 4, "block_norm_eps": 1e-5, "rope_theta": 1e6, "use_pos_enc": True,
}  # fmt: skip


@pytest.mark.parametrize("form", ["transformers 4", "first release", "mlx", "a copy of the head"])
def test_names_and_configurations_of_all_releases_give_the_same(source, tmp_path, form):
    model, config, weights = source
    match form:
        case "transformers 4":
            weights = {of_transformers_4(name): weight for name, weight in weights.items()}
            head = {"model.vision_tower.vision_model.head.probe": np.zeros((1, 1, 32), np.float32)}
            write(tmp_path, config, weights | head)
        case "first release":
            text = {n: v for n, v in config["text_config"].items() if n not in ("rope_parameters", "intermediate_size")}
            older = {n: v for n, v in config.items() if n not in ("image_token_id", "tie_word_embeddings")}
            older |= FIRST_RELEASE | {"text_config": text | OLDER_TEXT}
            write(tmp_path, older, {of_the_first_release(name): weight for name, weight in weights.items()})
            assert "model.vision_tower.vision_model.vision_encoder.layers.0.mlp.fc1.bias" in load_file(
                tmp_path / "model.safetensors"
            )
        case "mlx":
            write(
                tmp_path, config | {"model_type": "lfm2-vl"}, channels_last({of_mlx(n): w for n, w in weights.items()})
            )
        case "a copy of the head":
            write(tmp_path, config, weights | {"lm_head.weight": np.zeros((hf.VOCAB, 64), np.float32)})
    other = hf.loaded(tmp_path)
    assert other.modalities == ["image"]
    np.testing.assert_array_equal(our_logits(other, MADE), our_logits(model, MADE))


@pytest.mark.parametrize("has_packed_encoder", [False, True])
def test_an_mlx_checkpoint_packed_to_8_bits_agrees_within_its_error(source, tmp_path, has_packed_encoder):
    model, config, weights = source
    packed = {}
    for name, weight in channels_last({of_mlx(n): w for n, w in weights.items()}).items():
        is_matrix = weight.ndim == 2 and weight.shape[1] % 32 == 0
        if not is_matrix or (not has_packed_encoder and not name.startswith("language_model.")):
            packed[name] = weight
            continue
        base = name.removesuffix("weight")
        arrays = zip(("weight", "scales", "biases"), mx.quantize(mx.array(weight), group_size=32, bits=8), strict=True)
        packed |= {base + part: np.array(array) for part, array in arrays}
    assert ("vision_tower.embeddings.position_embedding.scales" in packed) == has_packed_encoder
    other = hf.loaded(write(tmp_path, config | {"quantization": {"group_size": 32, "bits": 8}}, packed))
    wanted, got = our_logits(model, MADE), our_logits(other, MADE)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_a_checkpoint_converted_to_8_bits_agrees_within_its_error(source, tmp_path):
    model, config, weights = source
    (tmp_path / "source").mkdir()
    made = convert(
        str(write(tmp_path / "source", config, weights)), tmp_path / "packed", mode="affine", bits=8, group_size=32
    )
    encoder = [name for name in weights if "language_model" not in name]
    assert made.num_encoder_tensors == len(encoder) > 20
    assert "language_model.model.layers.0.conv.in_proj.scales" in load_file(tmp_path / "packed" / "model.safetensors")
    other = hf.loaded(tmp_path / "packed")
    before, after = (dict(tree_flatten(m.model.parameters())) for m in (model, other))
    assert before.keys() == after.keys()
    for name, array in before.items():
        # Half a step of rounding, and half of a grid that MLX moves so that it holds the largest value exactly.
        step = float(array.max() - array.min()) / 255
        assert float(mx.abs(array - after[name]).max()) <= step + 1e-6, name
    np.testing.assert_array_equal(hf.encoded(other, MADE.media[0]), hf.encoded(model, MADE.media[0]))
    wanted, got = our_logits(model, MADE), our_logits(other, MADE)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


@pytest.mark.parametrize("form", ["its configuration stays", "none in the configuration", "mlx-lm's"])
def test_a_text_only_conversion_takes_text_only(source, tmp_path, form):
    model, config, weights = source
    config = {**config}
    weights = without(without(weights, "vision_tower"), "multi_modal_projector")
    if form == "none in the configuration":
        del config["vision_config"]
    elif form == "mlx-lm's":  # which ties the head and writes the contrary
        config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
        weights = channels_last({of_mlx(n): w for n, w in weights.items()})
    other = hf.loaded(write(tmp_path, config, weights))
    assert other.modalities == []
    made = hf.prompt([[5, 6, 7]])
    np.testing.assert_array_equal(our_logits(other, made), our_logits(model, made))


def test_a_head_that_is_told_of_and_not_there_is_the_embedding(source, tmp_path):
    model, config, weights = source
    other = hf.loaded(write(tmp_path, config | {"tie_word_embeddings": False}, weights))
    np.testing.assert_array_equal(our_logits(other, MADE), our_logits(model, MADE))


REFUSED = {
    "text decoder": ({"text_config": {"model_type": "llama"}}, "text decoder 'llama'"),
    "rotation": ({"text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "rope type 'yarn'"),
    "older rotation": ({"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}}, "rope type 'linear'"),
    "head size": ({"text_config": {"head_dim": 16}}, "4 heads of 16"),
    "layer kind": ({"text_config": {"layer_types": ["conv", "sliding_attention"] * 2}}, "sliding_attention"),
    "layer count": ({"text_config": {"layer_types": ["conv", "full_attention"]}}, "2 of 4"),
    "no attention": ({"text_config": {"layer_types": ["conv"] * 4}}, "not supported"),
    "no width": ({"text_config": {"intermediate_size": None}}, "malformed"),
    "no layers": ({"text_config": {"num_hidden_layers": "some"}}, "malformed"),
    "no text": ({"text_config": None}, "malformed"),
    "encoder": ({"vision_config": {"model_type": "clip_vision_model"}}, "image encoder 'clip_vision_model'"),
    "activation": ({"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu'"),
    "channels": ({"vision_config": {"num_channels": 1}}, "1 channels"),
    "positions": ({"vision_config": {"num_patches": 24}}, "24 is not a square"),
    "patches": ({"vision_config": {"patch_size": [4, 4]}}, "malformed"),
    "feature layer": ({"vision_feature_layer": -2}, "vision_feature_layer -2"),
    "projector": ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name):
    changes, reason = REFUSED[name]
    config = {"model_type": "lfm2_vl", "text_config": hf.TEXT, "vision_config": hf.VISION, **hf.MORE}
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(BadModel, match=reason):
        Lfm2VlConfig.from_hf(config, 0)
