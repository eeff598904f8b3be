"""Models with random weights in the shapes of real ones: what a step costs does not depend on the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from workers.drafters.gemma4_assistant import AssistantConfig, Gemma4Assistant
from workers.load import LoadedModel
from workers.load.loader import cast
from workers.models.own import OWN, adapted_to_caches

MAX_MODEL_LEN = 8192

_QWEN35_4B = {
    "hidden_size": 2560, "num_hidden_layers": 32, "intermediate_size": 9216, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320, "rms_norm_eps": 1e-6,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "tie_word_embeddings": True,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_section": [11, 11, 10], "mrope_interleaved": True},
}  # fmt: skip
_GEMMA4 = {
    "model_type": "gemma4_text", "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "head_dim": 256,
    "global_head_dim": 512, "rms_norm_eps": 1e-6, "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": MAX_MODEL_LEN, "sliding_window_pattern": 6,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"partial_rotary_factor": 1.0, "rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip


def _layer_types(num_layers: int) -> list[str]:
    return ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(num_layers)]


SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": False,
    },
    "24b": {
        "model_type": "llama", "hidden_size": 5120, "num_hidden_layers": 40, "intermediate_size": 32768,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 1e8, "max_position_embeddings": MAX_MODEL_LEN, "tie_word_embeddings": False,
    },
    "1b": {
        "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": MAX_MODEL_LEN,
        "tie_word_embeddings": True,
    },
    "qwen3.5-4b": {"model_type": "qwen3_5", "text_config": _QWEN35_4B},
    "qwen3.5-tiny": {
        "model_type": "qwen3_5",
        "text_config": {
            **_QWEN35_4B, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 128, "vocab_size": 512,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        },
    },
    "gemma4-e4b": {
        **_GEMMA4, "hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "num_attention_heads": 8,
        "num_key_value_heads": 2, "num_kv_shared_layers": 18, "hidden_size_per_layer_input": 256,
        "sliding_window": 512, "use_double_wide_mlp": False, "layer_types": _layer_types(42),
    },
    "gemma4-26b-a4b": {
        **_GEMMA4, "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112, "num_attention_heads": 16,
        "num_key_value_heads": 8, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0, "sliding_window": 1024, "use_double_wide_mlp": False,
        "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
        "layer_types": _layer_types(30),
    },
    "gemma4-tiny": {
        **_GEMMA4, "hidden_size": 64, "num_hidden_layers": 12, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 64, "vocab_size": 512,
        "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 32,
        "sliding_window": 32, "use_double_wide_mlp": False, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 32, "layer_types": _layer_types(12),
    },
}  # fmt: skip

_ASSISTANT_TEXT = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "hidden_size_per_layer_input": 0, "enable_moe_block": False,
}  # fmt: skip

# What a target's assistant has of its own, the rest is the target's. With these sizes the tensors of both real ones are
# as large as the published files without their headers: 159,132,680 and 839,422,472 bytes.
ASSISTANTS: dict[str, dict[str, Any]] = {
    "gemma4-e4b": {
        "text_config": {"hidden_size": 256, "intermediate_size": 2048, "num_attention_heads": 4},
        "use_ordered_embeddings": True, "num_centroids": 2048, "centroid_intermediate_top_k": 32,
    },
    "gemma4-26b-a4b": {
        "text_config": {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16},
    },
    "gemma4-tiny": {
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4},
        "use_ordered_embeddings": True, "num_centroids": 16, "centroid_intermediate_top_k": 4,
    },
}  # fmt: skip


def assistant_config(shape: str) -> dict[str, Any]:
    """The config.json of the assistant for this target."""
    own = ASSISTANTS[shape]
    return {
        "architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
        "backbone_hidden_size": SHAPES[shape]["hidden_size"], **own,
        "text_config": {**SHAPES[shape], **_ASSISTANT_TEXT, **own["text_config"]},
    }  # fmt: skip


def write_assistant(folder: Path, shape: str, dtype: str) -> None:
    """A checkpoint with random weights in the shape of the assistant for this target."""
    config = assistant_config(shape)
    model = Gemma4Assistant(AssistantConfig.from_hf(config))
    _randomise(model, dtype)
    if model.config.num_centroids:  # each token in one cluster, so that as many rows are read as of a real one
        model.masked_embedding.token_ordering = mx.random.permutation(model.config.text.vocab_size).astype(mx.int32)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))


def random_model(shape: str, dtype: str, max_model_len: int = MAX_MODEL_LEN) -> LoadedModel:
    """Our definition of the shape, on the device, ready for an engine."""
    config = SHAPES[shape]
    own = OWN.get(config["model_type"])
    model = own.model(own.read_config(config, max_model_len)) if own is not None else mlx_lm_model(shape)
    _randomise(model, dtype)
    if hasattr(model, "fuse"):
        model.fuse()
    mx.eval(model.parameters())
    ready = model if own is not None else adapted_to_caches(model, config["model_type"])
    text = config.get("text_config", config)
    return LoadedModel(
        model=ready, config=config, name=f"random-{shape}", architecture=config["model_type"],
        fingerprint=f"random-{shape}", eos_token_ids=[], max_model_len=max_model_len,
        vocab_size=int(text["vocab_size"]), dtype=dtype,
    )  # fmt: skip


def random_mlx_lm_model(shape: str, dtype: str) -> nn.Module:
    """mlx-lm's definition of the shape, on the device."""
    model = mlx_lm_model(shape)
    _randomise(model, dtype)
    mx.eval(model.parameters())
    return model


def mlx_lm_model(shape: str) -> nn.Module:
    from importlib import import_module

    module = import_module(f"mlx_lm.models.{SHAPES[shape]['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(SHAPES[shape]))
    return model


def _randomise(model: nn.Module, dtype: str) -> None:
    """Small normal values in matrices, what the constructor gave elsewhere; each array is made when it is needed."""
    kind = getattr(mx, dtype)

    def drawn(_path: str, array: mx.array) -> mx.array:
        if array.ndim < 2 or not mx.issubdtype(array.dtype, mx.floating):
            return array
        return mx.random.normal(array.shape, dtype=kind) * 0.02

    model.update(tree_map_with_path(drawn, model.parameters()))
    cast(model, kind)
    model.eval()
