"""A tiny random Gemma 4 (sliding and full layers, images, clips) and its assistant, as folders under MLX's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from tests.support import tiny_model
from workers.drafters.gemma4_assistant import AssistantConfig, Gemma4Assistant
from workers.models.gemma.model import Gemma, MultimodalConfig

HIDDEN, WINDOW = 48, 16
TOKENS = ("<|image|>", "<|boi|>", "<|eoi|>", "<|audio|>", "<|boa|>", "<|eoa|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|image|>{% elif p.type == 'audio' %}<|audio|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TEXT = {
    "model_type": "gemma4_text", "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
    "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0, "max_position_embeddings": tiny_model.MAX_POSITIONS, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2, "position_embedding_size": 1200,
}  # fmt: skip
AUDIO = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "subsampling_conv_channels": [128, 4],
    "output_proj_dims": 24,
}  # fmt: skip
ASSISTANT = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}  # fmt: skip


def write(folder: Path, seed: int = 0) -> Path:
    """Write the target with the tokenizer of `tiny_model`, every byte a token; return its folder."""
    tiny_model.write(folder, more=TOKENS)
    tokens = json.loads((folder / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in tokens["added_tokens"]}
    image, boi, eoi, audio, boa, eoa = (ids[name] for name in TOKENS)
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
        "text_config": {**TEXT, "vocab_size": max(ids.values()) + 1}, "vision_config": VISION,
        "audio_config": AUDIO | {"use_clipped_linears": False},
        "image_token_id": image, "boi_token_id": boi, "eoi_token_id": eoi, "audio_token_id": audio,
        "boa_token_id": boa, "eoa_token_id": eoa, "eos_token_id": ids["<|end|>"],
    }  # fmt: skip
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    _save(Gemma(MultimodalConfig.from_hf(config, 0)), config, folder, seed)
    return folder


def write_assistant(folder: Path, target: Path, seed: int = 1) -> Path:
    """Write an assistant for a target of `write`."""
    folder.mkdir(parents=True)
    vocab_size = json.loads((target / "config.json").read_text())["text_config"]["vocab_size"]
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
        "backbone_hidden_size": HIDDEN, "text_config": {**TEXT, **ASSISTANT, "vocab_size": vocab_size},
    }  # fmt: skip
    _save(Gemma4Assistant(AssistantConfig.from_hf(config)), config, folder, seed)
    return folder


def _save(model: nn.Module, config: dict[str, Any], folder: Path, seed: int) -> None:
    """Matrices large enough that greedy text wanders; norms and scalars near one."""
    key = mx.random.key(seed)
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        scale = 0.05 if array.ndim < 2 or "embed_tokens" in name else 0.3  # a large embedding repeats its token
        noise = mx.random.normal(array.shape, key=own) * scale
        weights[name] = noise if array.ndim > 1 else array + noise
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
