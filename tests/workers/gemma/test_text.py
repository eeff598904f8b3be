"""The text decoders of Gemma 3, 3n and 4 against transformers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.support.cached_logits import cached_logits
from tests.support.engine_rig import EngineRig, make_engine
from tests.workers.gemma import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

SHARED = {"num_hidden_layers": 6, "layer_types": [*hf.KINDS[:2], *hf.KINDS], "num_kv_shared_layers": 2}
MOE = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24}
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5, "factor": 4.0}

CASES = {
    "gemma4 dense": ("gemma4_text", {}),
    "gemma4 soft-cap": ("gemma4_text", {"final_logit_softcapping": 3.0}),
    "gemma4 biases, untied": ("gemma4_text", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma4 k = v": ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4 k = v, all kv heads": ("gemma4_text", {"attention_k_eq_v": True}),
    "gemma4 shared kv": ("gemma4_text", SHARED),
    "gemma4 shared kv, double mlp": ("gemma4_text", {**SHARED, "use_double_wide_mlp": True}),
    "gemma4 per-layer embeddings": ("gemma4_text", {"hidden_size_per_layer_input": 12}),
    "gemma4 experts": ("gemma4_text", MOE),
    "gemma4 proportional factor": ("gemma4_text", {
        "rope_parameters": {**hf.ROPE, "full_attention": PROPORTIONAL},
    }),
    "gemma4 default rope on full layers": ("gemma4_text", {
        "rope_parameters": {**hf.ROPE, "full_attention": {"rope_type": "default", "rope_theta": 5e5}},
    }),
    "gemma4 like E2B": ("gemma4_text", {
        **SHARED, "hidden_size_per_layer_input": 12, "use_double_wide_mlp": True, "final_logit_softcapping": 30.0,
    }),
    "gemma4 like 26B-A4B": ("gemma4_text", {
        **MOE, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0,
    }),
    "gemma4 unified": ("gemma4_unified_text", {
        **{k: v for k, v in hf.GEMMA4.items() if "per_layer" not in k}, "attention_k_eq_v": True,
    }),
    "gemma3": ("gemma3_text", {}),
    "gemma3 soft-cap": ("gemma3_text", {"final_logit_softcapping": 3.0}),
    "gemma3 biases, untied": ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
    "gemma3 linear rope": ("gemma3_text", {
        "rope_parameters": {
            **hf.ROPE, "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    }),
    "gemma3 pattern": ("gemma3_text", {"layer_types": None, "sliding_window_pattern": 2}),
}  # fmt: skip


def overrides_of(case):
    model_type, overrides = CASES[case]
    if model_type == "gemma4_unified_text":
        return model_type, overrides
    return model_type, {**(hf.GEMMA3 if model_type == "gemma3_text" else hf.GEMMA4), **overrides}


@pytest.mark.parametrize("is_joined", [False, True], ids=["apart", "joined as on a GPU"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(transformers, tmp_path, case, is_joined):
    reference = hf.text_model(transformers, *overrides_of(case))
    model = hf.save_and_load(reference, tmp_path)
    if is_joined:
        model.is_cpu = False
        model.fuse()
        names = {name for name, _ in tree_flatten(model.parameters())}
        assert {"model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"} <= names
    tokens = np.random.default_rng(1).integers(3, hf.VOCAB, (2, 40))
    expected = hf.hf_logits(reference, tokens)
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(cached_logits(model, tokens), expected, rtol=0, atol=1e-4)


GREEDY_CASES = [case for case in CASES if "like" in case or case in ("gemma4 unified", "gemma3")]


@pytest.mark.parametrize("case", GREEDY_CASES)
def test_greedy_tokens_equal_transformers(transformers, tmp_path, case):
    """Through scheduler core and engine: two prompts together, the longer one prefilled in chunks."""
    reference = hf.text_model(transformers, *overrides_of(case))
    engine = make_engine(hf.save_and_load(reference, tmp_path))
    prompts = {"short": [5, 9, 4], "long": np.random.default_rng(2).integers(3, hf.VOCAB, 45).tolist()}
    got = EngineRig(engine).run(prompts, 32)
    for name, prompt in prompts.items():
        assert len(got[name]) == 32
        assert hf.hf_agrees(reference, prompt, got[name])
