"""The forms in which MiniCPM-V's checkpoints come: Hugging Face's names and MLX's, packed, text alone."""

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
from tests.workers.minicpm_v import hf
from workers.models.minicpm_v.config import MiniCpmVConfig

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

MADE = hf.prompt(hf.processor(), "See @ and\n@", [hf.picture(40, 60), hf.picture(9, 20)])
TEXT = hf.prompt(hf.processor(), "Only a text")


@pytest.fixture(scope="module")
def source(transformers, tmp_path_factory):
    """(our model, configuration, weights by transformers' names); widths that groups of 32 divide."""
    folder = tmp_path_factory.mktemp("source")
    _, model = hf.make(
        transformers, folder, {"hidden_size": 64, "intermediate_size": 96, "linear_value_head_dim": 16},
        {"hidden_size": 32, "intermediate_size": 64},
    )  # fmt: skip
    weights = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"model"}, "the head is the embedding"
    assert "model.vision_tower.vit_merger.linear_1.weight" in weights
    return model, json.loads((folder / "config.json").read_text()), weights


def write(folder, config, weights):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    "q_norm.weight",
    "k_norm.weight",
)


def of_mlx(weights):
    """As mlx-vlm writes them: the encoder's merger beside it, norms as their factor, convolutions' channels last."""
    made = {}
    for name, weight in weights.items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        name = name.replace("vision_tower.vit_merger.", "vit_merger.")
        if name.startswith("language_model.") and name.endswith(NORMS):
            weight = weight + 1
        elif name.endswith("conv1d.weight"):
            weight = weight.transpose(0, 2, 1).copy()
        elif name.endswith("patch_embedding.weight"):
            weight = weight.transpose(0, 2, 3, 1).copy()
        made[name] = weight
    return made


def with_head(weights):
    return weights | {"lm_head.weight": np.ones((hf.VOCAB, 64), np.float32)}


FORMS = {
    "mlx": lambda config, weights: (config, of_mlx(weights)),
    "a copy of the head": lambda config, weights: (config, with_head(weights)),
    "a head that is told of and not there": lambda config, weights: (config | {"tie_word_embeddings": False}, weights),
    "no outer field for the head": lambda config, weights: (
        {name: value for name, value in config.items() if name != "tie_word_embeddings"}, weights,
    ),
    "a head for drafts": lambda config, weights: (config, weights | {"mtp.fc.weight": np.ones((64, 128), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_all_names_and_configurations_give_the_same(source, tmp_path, form):
    model, config, weights = source
    text = config["text_config"] | {"tie_word_embeddings": False}  # the outer field decides
    other = hf.loaded(write(tmp_path, *FORMS[form](config | {"text_config": text}, weights)))
    assert other.modalities == ["image"]
    np.testing.assert_array_equal(our_logits(other, MADE), our_logits(model, MADE))


def test_a_configuration_as_released_is_read_the_same(source, tmp_path):
    """Layers by their kinds or by an interval, the rotation's share beside it."""
    model, config, weights = source
    text = {name: value for name, value in config["text_config"].items() if name != "layer_types"}
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    text |= {"full_attention_interval": 2, "rope_parameters": rope, "partial_rotary_factor": 0.5, "mlp_only_layers": []}
    other = hf.loaded(write(tmp_path, config | {"text_config": text, "downsample_mode": None}, weights))
    np.testing.assert_array_equal(our_logits(other, MADE), our_logits(model, MADE))


def test_what_a_configuration_leaves_out_has_transformers_defaults(transformers):
    """mlx-lm has others."""
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    text |= {"model_type": "qwen3_5_text", "rope_parameters": {"rope_theta": 5.0}}
    found = MiniCpmVConfig.from_hf({"model_type": "minicpmv4_6", "text_config": text, "vision_config": {}}, 0)
    wanted = transformers.MiniCPMV4_6Config(text_config=text)
    ours, theirs = found.text_args.text_config, wanted.text_config.to_dict()
    assert [i for i, kind in enumerate(theirs["layer_types"], start=1) if kind == "full_attention"] == [4]
    assert ours["full_attention_interval"] == 4
    rope = theirs.pop("rope_parameters")
    assert ours.pop("rope_parameters") == {**{n: rope[n] for n in rope if n != "rope_type"}, "type": rope["rope_type"]}
    both = ours.keys() & theirs.keys()
    assert len(both) > 14
    assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
    layers, vision = found.vision.layers, wanted.vision_config
    for name in ("hidden_size", "intermediate_size", "image_size", "patch_size", "layer_norm_eps"):
        assert getattr(layers, name) == getattr(vision, name)
    assert (layers.num_layers, layers.num_heads) == (vision.num_hidden_layers, vision.num_attention_heads)
    assert (found.vision.merged_layer, found.vision.merger_times) == (wanted.insert_layer_id, wanted.merger_times)


@pytest.mark.parametrize("has_packed_encoder", [False, True])
def test_an_mlx_checkpoint_packed_to_8_bits_agrees_within_its_error(source, tmp_path, has_packed_encoder):
    """One layer of the merger has groups of its own, by the name that MLX's configuration has for it."""
    model, config, weights = source
    packed = {}
    special = "vit_merger.linear_1"
    for name, weight in of_mlx(weights).items():
        is_matrix = weight.ndim == 2 and weight.shape[1] % 32 == 0
        if not is_matrix or (not has_packed_encoder and not name.startswith("language_model.")):
            packed[name] = weight
            continue
        base = name.removesuffix("weight")
        group_size = 64 if base == f"{special}." else 32
        arrays = mx.quantize(mx.array(weight), group_size=group_size, bits=8)
        packed |= {base + part: np.array(a) for part, a in zip(("weight", "scales", "biases"), arrays, strict=True)}
    assert (f"{special}.scales" in packed) == has_packed_encoder
    how = {"group_size": 32, "bits": 8, special: {"group_size": 64, "bits": 8} if has_packed_encoder else False}
    other = hf.loaded(write(tmp_path, config | {"quantization": how}, packed))
    wanted, got = our_logits(model, MADE), our_logits(other, MADE)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


def test_a_checkpoint_converted_to_8_bits_agrees_within_its_error(source, tmp_path):
    model, config, weights = source
    (tmp_path / "source").mkdir()
    made = convert(
        str(write(tmp_path / "source", config, weights)), tmp_path / "packed", mode="affine", bits=8, group_size=32
    )
    encoder = [name for name in weights if "language_model" not in name]
    assert made.num_encoder_tensors == len(encoder) > 30
    packed = load_file(tmp_path / "packed" / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.scales" in packed
    assert "merger.mlp.0.linear_1.weight" in packed and "merger.mlp.0.linear_1.scales" not in packed
    other = hf.loaded(tmp_path / "packed")
    before, after = (dict(tree_flatten(m.model.parameters())) for m in (model, other))
    assert before.keys() == after.keys()
    np.testing.assert_array_equal(hf.encoded(other, MADE.media[0]), hf.encoded(model, MADE.media[0]))
    wanted, got = our_logits(model, MADE), our_logits(other, MADE)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()


@pytest.mark.parametrize("form", ["its configuration stays", "none in the configuration", "mlx"])
def test_a_text_only_conversion_takes_text_only(source, tmp_path, form):
    model, config, weights = source
    weights = {name: weight for name, weight in weights.items() if "language_model" in name}
    if form == "none in the configuration":
        config = {name: value for name, value in config.items() if name != "vision_config"}
    elif form == "mlx":
        weights = of_mlx(weights)
    other = hf.loaded(write(tmp_path, config, weights))
    assert other.modalities == []
    np.testing.assert_array_equal(our_logits(other, TEXT), our_logits(model, TEXT))


def test_an_encoder_that_the_configuration_does_not_tell_of_is_left_out(source, tmp_path):
    model, config, weights = source
    del (config := {**config})["vision_config"]
    other = hf.loaded(write(tmp_path, config, weights))
    assert other.modalities == []
    np.testing.assert_array_equal(our_logits(other, TEXT), our_logits(model, TEXT))


def test_an_encoder_of_which_a_part_is_missing_is_refused(source, tmp_path):
    _, config, weights = source
    weights = {name: weight for name, weight in weights.items() if not name.startswith("model.merger.")}
    with pytest.raises(BadModel, match=r"merger\.mlp"):
        hf.loaded(write(tmp_path, config, weights))


REFUSED = {
    "text decoder": ({"text_config": {"model_type": "qwen3_5_moe_text"}}, "model_type 'qwen3_5_moe_text' of the text"),
    "no gate": ({"text_config": {"attn_output_gate": False}}, "attn_output_gate False"),
    "text activation": ({"text_config": {"hidden_act": "gelu"}}, "hidden_act 'gelu' of the text"),
    "rotation": ({"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}}, "rope type 'yarn'"),
    "older rotation": ({"text_config": {"rope_parameters": None, "rope_scaling": {"type": "linear"}}}, "'linear'"),
    "no base": ({"text_config": {"rope_parameters": {}}}, "rope_theta' is missing"),
    "uneven layers": (
        {"text_config": {"layer_types": ["full_attention", "linear_attention"] + ["full_attention"] * 2}}, "uneven",
    ),
    "layer count": ({"text_config": {"layer_types": ["full_attention"] * 2}}, "2 of 4 layers"),
    "no width": ({"text_config": {"hidden_size": None}}, "malformed"),
    "no text": ({"text_config": None}, "malformed"),
    "encoder": ({"vision_config": {"model_type": "clip_vision_model"}}, "image encoder 'clip_vision_model'"),
    "activation": ({"vision_config": {"hidden_act": "relu"}}, "hidden_act 'relu'"),
    "channels": ({"vision_config": {"num_channels": 1}}, "1 channels"),
    "window": ({"vision_config": {"window_kernel_size": [4, 4]}}, r"window_kernel_size \[4, 4\]"),
    "kernel": ({"merge_kernel_size": [1, 4]}, r"merge_kernel_size \[1, 4\]"),
    "patches": ({"vision_config": {"patch_size": [4, 4]}}, "malformed"),
    "mode": ({"downsample_mode": "2x"}, "downsample_mode '2x'"),
    "last layer": ({"drop_vision_last_layer": True}, "drop_vision_last_layer"),
    "layer": ({"insert_layer_id": 3}, "insert_layer_id 3 is none of 3 layers"),
    "negative layer": ({"insert_layer_id": -1}, "insert_layer_id -1"),
    "rounds": ({"merger_times": 0}, "merger_times 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused(name):
    changes, reason = REFUSED[name]
    config = {"model_type": "minicpmv4_6", "text_config": hf.TEXT, "vision_config": hf.VISION, **hf.MORE}
    assert MiniCpmVConfig.from_hf(config, 0).vision is not None
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(BadModel, match=reason):
        MiniCpmVConfig.from_hf(config, 0)
