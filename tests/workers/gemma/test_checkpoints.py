"""The forms in which Gemma's checkpoints come: original multimodal names, older configurations, mixed quantisation."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from frontend.media.processors import processor_of
from shared.errors import BadModel
from shared.model_files import ModelFiles
from tests.support.cached_logits import cached_logits
from tests.workers.gemma import hf
from workers.load import load
from workers.models.checkpoint_names import canonical_name
from workers.models.gemma.config import GemmaConfig
from workers.models.gemma.model import ENCODER_PARTS, Gemma, MultimodalConfig

pytestmark = pytest.mark.mlx

TOKENS = np.random.default_rng(1).integers(3, hf.VOCAB, (2, 30))
SHARED = {"num_hidden_layers": 6, "layer_types": [*hf.KINDS[:2], *hf.KINDS], "num_kv_shared_layers": 2}
E2B = {**SHARED, "hidden_size_per_layer_input": 12, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0}
MOE = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32}


def expect_logits(folder, expected):
    model = load(ModelFiles(name="m", folder=folder), "float32").model
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS))), expected, rtol=0, atol=1e-4)
    return model


def as_released(folder, text_key_changes):
    """Turn a saved text model into the form of a released multimodal checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    model_type = config["model_type"].removesuffix("_text")
    released = {"model_type": model_type, "text_config": text_key_changes(config), "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(released))
    weights = load_file(folder / "model.safetensors")
    renamed = {"model.language_model." + name.removeprefix("model."): array for name, array in weights.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.oracle
def test_original_names_and_the_configuration_of_the_released_gemma4(transformers, tmp_path):
    """Released configurations say `global_head_dim`; transformers 5.23 writes `per_layer_config`."""
    overrides = {**hf.GEMMA4, **E2B, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    reference = hf.text_model(transformers, "gemma4_text", overrides)
    reference.save_pretrained(tmp_path)

    def released(config):
        config.pop("per_layer_config")
        return config | {"global_head_dim": 32, "num_global_key_value_heads": 1}

    as_released(tmp_path, released)
    assert isinstance(expect_logits(tmp_path, hf.hf_logits(reference, TOKENS)), Gemma)


@pytest.mark.oracle
def test_original_names_and_the_configuration_of_the_released_gemma3(transformers, tmp_path):
    """Released configurations have one base for each kind of layer, a pattern, and a scaling for full layers."""
    rope = {**hf.ROPE, "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}
    reference = hf.text_model(transformers, "gemma3_text", {**hf.GEMMA3, "rope_parameters": rope})
    reference.save_pretrained(tmp_path)

    def released(config):
        config.pop("rope_parameters")
        config.pop("layer_types")
        scaling = {"factor": 8.0, "rope_type": "linear"}
        return config | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": scaling,
                         "sliding_window_pattern": 2}  # fmt: skip

    as_released(tmp_path, released)
    expect_logits(tmp_path, hf.hf_logits(reference, TOKENS))


@pytest.mark.oracle
def test_what_only_shared_layers_would_use_is_left_out(transformers, tmp_path):
    """Released E2B and E4B hold key and value projections for layers that read another layer's."""
    reference = hf.text_model(transformers, "gemma4_text", {**hf.GEMMA4, **E2B})
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in ("k_proj", "v_proj", "k_norm"):
        weights[f"model.layers.5.self_attn.{name}.weight"] = np.ones((3, 3), np.float32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    expect_logits(tmp_path, hf.hf_logits(reference, TOKENS))


THEIR_DEFAULTS = {  # said, because mlx-lm fills in other values than transformers
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "final_logit_softcapping": 30.0,
}  # fmt: skip


@pytest.mark.parametrize("overrides", [E2B, MOE], ids=["E2B", "experts"])
def test_mixed_quantisation_by_layer(tmp_path, overrides):
    """4 bits, 8 for what the configuration names, some plain, as mlx-vlm's converter writes; mlx-lm agrees."""
    text = {**hf.GEMMA4, **THEIR_DEFAULTS, **overrides, "model_type": "gemma4_text"}
    config = {"model_type": "gemma4", "text_config": text, "tie_word_embeddings": True, "vocab_size": hf.VOCAB}
    mx.random.seed(3)
    model = Gemma(MultimodalConfig.from_hf(config, 0))
    plain = {"language_model.model.layers.1.mlp.down_proj", "language_model.model.layers.2.self_attn.o_proj"}
    quantisation = {"group_size": 32, "bits": 4, "mode": "affine"}
    by_path = {}

    def how(path, module):
        if not hasattr(module, "to_quantized") or path in plain or module.weight.shape[-1] % 32:
            return False
        if "down_proj" in path or path.endswith("router.proj"):
            by_path[path] = {"group_size": 32, "bits": 8}
            return by_path[path]
        return True

    nn.quantize(model, class_predicate=how, **{k: quantisation[k] for k in ("group_size", "bits")})
    weights = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    assert len(by_path) >= 2
    config["quantization"] = quantisation | by_path | dict.fromkeys(plain, False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", {"format": "mlx"})
    expect_logits(tmp_path, np.array(model(mx.array(TOKENS))))
    theirs, _ = load_model(tmp_path)
    expect_logits(tmp_path, np.array(theirs(mx.array(TOKENS))))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.patch_embedder.input_proj.weight", "vision_tower.patch_embedder.input_proj.weight"),
        ("model.embed_audio.embedding_projection.weight", "embed_audio.embedding_projection.weight"),
    ],
)
def test_names_of_both_checkpoint_forms(name, expected):
    assert canonical_name(name, ENCODER_PARTS) == expected


REFUSED = {
    "relu": ({"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    "bidirectional": ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    "score cap": ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "layer type": ({"layer_types": ["chunked_attention"] * 4}, "unknown layer type"),
    "layer count": ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    "nothing to read": ({"num_kv_shared_layers": 3}, "leaves no full_attention layer"),
    "all shared": ({"num_kv_shared_layers": 4}, "num_kv_shared_layers"),
    "kv heads": ({"num_key_value_heads": 3}, "4 heads of 16 over 3"),
    "experts": ({"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 8}, "0 of 4 experts"),
    "no hidden size": ({"hidden_size": None}, "malformed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_decoder_does_not_compute_is_refused(case):
    overrides, reason = REFUSED[case]
    with pytest.raises(BadModel, match=reason):
        GemmaConfig.from_hf({**hf.GEMMA4, "model_type": "gemma4_text", **overrides}, 0)


GEMMA3N = {
    "vocab_size": hf.VOCAB, "vocab_size_per_layer_input": 88, "hidden_size": 32, "intermediate_size": [48] * 5,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "hidden_size_per_layer_input": 8, "sliding_window": hf.WINDOW, "num_kv_shared_layers": 2, "laurel_rank": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0, 0.0], "altup_num_inputs": 3, "final_logit_softcapping": 30.0,
    "max_position_embeddings": 512,
}  # fmt: skip
GEMMA3N_CASES = {
    "all": {},
    "another active stream, unscaled": {"altup_active_idx": 1, "altup_correct_scale": False},
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("case", GEMMA3N_CASES)
@pytest.mark.parametrize("is_released", [True, False], ids=["as released", "as transformers 5 saves it"])
def test_gemma3n_text_equals_transformers(transformers, tmp_path, case, is_released):
    """mlx-lm's layers on our caches: chunked prefill, rows of two lengths, keys read from an earlier layer."""
    reference = hf.text_model(transformers, "gemma3n_text", {**GEMMA3N, **GEMMA3N_CASES[case]})
    reference.save_pretrained(tmp_path)

    def released(config):
        if not is_released:
            return config
        config.pop("rope_parameters")
        return config | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}

    weights = load_file(tmp_path / "model.safetensors")
    for layer in (3, 4) if is_released else ():  # projections that nothing reads; transformers 5 does not save them
        for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
            unread = weights[f"model.layers.0.self_attn.{name}"]
            weights[f"model.layers.{layer}.self_attn.{name}"] = np.zeros_like(unread)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    as_released(tmp_path, released)
    model = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    assert model.modalities == []
    assert processor_of(tmp_path).modalities == (), "so that a request with media is refused"
    expected = hf.hf_logits(reference, TOKENS)
    np.testing.assert_allclose(cached_logits(model, TOKENS), expected, rtol=0, atol=1e-4)
