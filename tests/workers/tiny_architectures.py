"""A tiny configuration for each mlx-lm architecture that the tests run: a few layers of width 32, 67 tokens."""

from __future__ import annotations

from typing import Any

VOCAB = 67
WINDOW = 8

BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5, "norm_epsilon": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "use_bias": False, "hidden_act": "silu",
    "partial_rotary_factor": 0.5, "sliding_window": WINDOW, "rope_scaling": None,
}  # fmt: skip

MOE = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "top_k_experts": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "moe_layer_freq": 1, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}  # fmt: skip

MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

LINEAR = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True,
}  # fmt: skip

MAMBA2 = {
    "mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 16, "mamba_d_head": 16, "mamba_d_ssm": 64,
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 2, "mamba_proj_bias": False, "mamba_conv_bias": True,
    "mamba_expand": 2, "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 2, "use_conv_bias": True,
}  # fmt: skip

GRANITE = {
    "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
}  # fmt: skip

YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip

FULL, SLIDING = "full_attention", "sliding_attention"

ROPE_BY_TYPE = {
    FULL: {"rope_type": "default", "rope_theta": 10000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
}

# What each differs in from BASE. A key with a slash is a variant of the architecture before it.
RUNS: dict[str, dict[str, Any]] = {
    "Klear": MOE,
    "afmoe": {**MOE, "layer_types": [SLIDING, SLIDING, FULL], "num_dense_layers": 1},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "bailing_moe": MOE,
    "bailing_moe_linear": {**MOE, "layer_group_size": 3, "group_norm_size": 1, "num_key_value_heads": 4},
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 32, "n_layers": 2, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": {**MOE, "num_key_value_heads": 4},
    "deepseek_v2": {**MOE, **MLA, "topk_method": "greedy", "rope_scaling": YARN},
    "deepseek_v32": {**MOE, **MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8, "rope_scaling": YARN},
    "deepseek_v3": {**MOE, **MLA},
    "dots1": MOE,
    "ernie4_5": {},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4},
    "exaone": {"num_layers": 3},
    "exaone4": {"sliding_window_pattern": "LLG", "rope_scaling": {"rope_type": "default"}},
    "exaone_moe": {**MOE, "layer_types": [SLIDING, SLIDING, FULL], "is_moe_layer": [False, True, True]},
    "falcon_h1": MAMBA2,
    "gemma": {},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8},
    "gemma3": {"text_config": {**BASE, "model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_scaling": None}},
    "gemma3_text": {"sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "gemma3n": {
        "text_config": {
            **BASE, "model_type": "gemma3n_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB, "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0,
            "layer_types": [SLIDING, FULL, SLIDING, FULL], "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
            "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 4,
        }
    },
    "gemma4_text": {
        "num_hidden_layers": 4, "global_head_dim": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB, "layer_types": [SLIDING, FULL, SLIDING, FULL], "rope_parameters": None,
        "tie_word_embeddings": True,
    },
    "glm": {},
    "glm4": {},
    "glm4_moe": {**MOE, "use_qk_norm": True},
    "glm_moe_dsa": {
        **MOE, **MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe_lite": {**MOE, **MLA},
    "gpt2": {"n_ctx": 256, "n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    "gpt_oss": {**MOE, "layer_types": [SLIDING, FULL, SLIDING], "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    }},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256, "rotary_dim": 4, "n_inner": 64},
    "granite": GRANITE,
    "granitemoe": {**GRANITE, **MOE},
    "granitemoehybrid": {
        **GRANITE, **MOE, **MAMBA2, "shared_intermediate_size": 16, "layer_types": ["mamba", "attention", "mamba"],
        "tie_word_embeddings": True,
    },
    "helium": {},
    "hunyuan": {
        **MOE, "moe_topk": 2, "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_qk_norm": True, "use_cla": False,
        "cla_share_factor": 1, "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "hunyuan_v1_dense": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0}},
    "internlm2": {"bias": False},
    "internlm3": {"bias": False, "qkv_bias": False},
    "jamba": {
        **MOE, **MAMBA2, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_linear": {
        **MOE, **MLA, "num_experts_per_token": 2, "model_max_length": 256,
        "linear_attn_config": {
            "kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 4,
        },
    },
    "laguna": {
        **MOE, "layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": ROPE_BY_TYPE, "partial_rotary_factor": 1.0,
    },
    "lfm2": {
        "conv_bias": False, "conv_L_cache": 3, "block_dim": 32, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False, "layer_types": ["conv", FULL, "conv"],
    },
    "lfm2_moe": {
        **MOE, "use_expert_bias": True, "num_dense_layers": 1, "conv_bias": False, "conv_L_cache": 3,
        "layer_types": ["conv", FULL, "conv"],
    },
    "llama": {},
    "llama/sliding": {"layer_types": [SLIDING, FULL, SLIDING]},
    "llama/tied": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "longcat_flash": {
        **MOE, **MLA, "attention_method": "MLA", "zero_expert_type": "identity", "ffn_hidden_size": 48, "moe_topk": 2,
        "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "num_layers": 2, "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mamba": {**MAMBA2, "state_size": 8, "time_step_rank": 4},
    "mamba2": {
        **MAMBA2, "num_heads": 4, "head_dim": 16, "state_size": 16, "time_step_limit": [0.0, 100.0],
        "time_step_rank": 4,
    },
    "mellum": {**MOE, "layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": ROPE_BY_TYPE},
    "mimo": {"num_nextn_predict_layers": 1},
    "mimo_v2_flash": {
        **MOE, "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False, "sliding_window_size": WINDOW, "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "v_head_dim": 8,
        "swa_head_dim": 8, "swa_v_head_dim": 8,
    },
    "minicpm": {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12},
    "minicpm3": {**MLA, "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 12, "rope_scaling": {
        "type": "longrope", "original_max_position_embeddings": 256, "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
    }},
    "minimax": {**MOE, "shared_intermediate_size": 16, "rotary_dim": 4},
    "ministral3": {"layer_types": [SLIDING, FULL, SLIDING], "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 16,
    }},
    "mistral3": {"text_config": {**BASE, "model_type": "llama"}},
    "mistral4": {**MOE, **MLA, "rope_parameters": {
        **YARN, "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "rope_interleave": True,
    }},
    "mixtral": MOE,
    "nanochat": {"num_key_value_heads": 4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron_h": {**MAMBA2, **MOE, "hybrid_override_pattern": ["M", "*", "-", "M"], "hidden_act": "relu2"},
    "olmo2": {},
    "olmo3": {"layer_types": [SLIDING, SLIDING, FULL]},
    "olmo_hybrid": {**LINEAR, "layer_types": ["linear_attention", FULL, "linear_attention"]},
    "olmoe": MOE,
    "openelm": {
        "num_transformer_layers": 3, "model_dim": 32, "ffn_dim_divisor": 8, "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 2], "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "phi": {},
    "phi3": {},
    "phimoe": {**MOE, "rope_scaling": {
        "type": "longrope", "original_max_position_embeddings": 256, "short_factor": [1.0] * 4,
        "long_factor": [1.0] * 4,
        "short_mscale": 1.0, "long_mscale": 1.0,
    }},
    "phixtral": {
        "num_vocab": VOCAB, "model_dim": 32, "num_heads": 4, "num_layers": 3, "rotary_dim": 4,
    },
    "plamo": {"n_shared_head": 2},
    "plamo2": {
        **MAMBA2, "hidden_size_per_head": 16, "num_hidden_layers": 4, "tie_word_embeddings": True,
    },
    "plamo3": {"window_size": WINDOW, "sliding_window_pattern": 2},
    "qwen": {"kv_channels": 8, "no_bias": True, "rotary_emb_base": 10000.0, "seq_length": 256},
    "qwen2": {},
    "qwen2_moe": MOE,
    "qwen2_vl": {"text_config": {**BASE, "model_type": "qwen2"}},
    "qwen3": {},
    "qwen3_5": {"text_config": {
        **BASE, **LINEAR, "model_type": "qwen3_5_text", "num_hidden_layers": 4, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
        },
    }},
    "qwen3_5_moe": {"text_config": {
        **BASE, **MOE, **LINEAR, "model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0],
        },
    }},
    "qwen3_moe": MOE,
    "qwen3_next": {**MOE, **LINEAR, "num_hidden_layers": 4},
    "qwen3_vl": {"text_config": {**BASE, "model_type": "qwen3"}},
    "recurrent_gemma": {
        "conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": WINDOW, "num_key_value_heads": 1,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 1, 0], "no_rope_layer_interval": 3},
    "solar_open": MOE,
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {},
    "step3p5": {
        "num_attention_groups": 2, "layer_types": [SLIDING, FULL, SLIDING], "moe_num_experts": 4, "moe_top_k": 2,
        "moe_intermediate_size": 16, "share_expert_dim": 16, "moe_layers_enum": "1,2",
    },
    "telechat3": {},
    "youtu_llm": MLA,
}  # fmt: skip

# Refused at load, with the words that the error must hold.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "afm7": (
        {"hidden_dim": 32, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
        "positions from the number of keys",
    ),
    "gpt_bigcode": (
        {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 256, "n_inner": 64, "multi_query": True},
        "rows of different lengths",
    ),
    "llama4": (
        {"text_config": {
            **BASE, **MOE, "model_type": "llama4_text", "attention_chunk_size": 16, "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 48, "use_qk_norm": True, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0],
            "attn_temperature_tuning": 4, "floor_scale": 8192, "attn_scale": 0.1,
            "num_experts_per_tok": 1,
        }},
        "ChunkedKVCache",
    ),
    "phi3small": (
        {"dense_attention_every_n_layers": 1, "ff_intermediate_size": 48, "gegelu_limit": 20.0,
         "mup_attn_multiplier": 1.0, "mup_width_multiplier": 1.0, "mup_embedding_multiplier": 1.0,
         "rope_embedding_base": 10000, "rope_position_scale": 1.0},
        "block-sparse",
    ),
}  # fmt: skip


def config_of(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration of an entry above."""
    return {**BASE, "model_type": name.split("/")[0], **overrides}
