"""A tiny random Qwen3.5 (recurrent and attention layers, images, an MTP head) as a folder under MLX's names."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5

from tests.support import tiny_model
from workers.models.qwen.added_vision import Qwen35
from workers.models.qwen.config import AddedVisionConfig

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 48, 64, 4, 2, 16
TEXT = {
    "model_type": "qwen3_5_text", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 4,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6,
    "max_position_embeddings": tiny_model.MAX_POSITIONS, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
}  # fmt: skip
MTP = {
    "fc": (HIDDEN, 2 * HIDDEN), "pre_fc_norm_embedding": (HIDDEN,), "pre_fc_norm_hidden": (HIDDEN,), "norm": (HIDDEN,),
    "layers.0.input_layernorm": (HIDDEN,), "layers.0.post_attention_layernorm": (HIDDEN,),
    "layers.0.self_attn.q_proj": (2 * HEADS * HEAD_DIM, HIDDEN),
    "layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "layers.0.self_attn.q_norm": (HEAD_DIM,), "layers.0.self_attn.k_norm": (HEAD_DIM,),
    "layers.0.mlp.gate_proj": (INNER, HIDDEN), "layers.0.mlp.up_proj": (INNER, HIDDEN),
    "layers.0.mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def write(folder: Path, seed: int = 0) -> Path:
    """Write it with the tokenizer of `tiny_model`, every byte a token; return its folder."""
    tiny_model.write_qwen2_vl(folder)  # for its tokenizer, template and image settings
    older = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in older.items() if name.endswith("_token_id")} | {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "vision_config": VISION,
        "text_config": {**TEXT, "vocab_size": older["vocab_size"]}, "tie_word_embeddings": True,
    }  # fmt: skip
    mx.random.seed(seed)  # time constants are drawn as the model is made
    model = Qwen35(AddedVisionConfig.from_hf(config, 0, qwen3_5.ModelArgs.from_dict))
    shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
    kept = {name: array for name, array in tree_flatten(model.parameters()) if array.ndim == 1}
    shapes |= {f"mtp.{name}.weight": shape for name, shape in MTP.items()}
    key = mx.random.key(seed)
    weights = {}
    for name, shape in shapes.items():
        key, own = mx.random.split(key)
        noise = mx.random.normal(shape, key=own)
        # Matrices large enough that greedy text wanders; norms near one, time constants as they are made.
        weights[name] = noise * 0.4 if len(shape) > 1 else kept.get(name, mx.ones(shape)) + noise * 0.05
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
