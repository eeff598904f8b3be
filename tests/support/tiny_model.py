"""A tiny random Llama as a Hugging Face folder: every byte is a token, weights are seeded, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, HEAD_DIM = 48, 3, 4, 2, 96, 12
MAX_POSITIONS = 512
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write(folder: Path, seed: int = 0, sliding_window: int | None = None) -> Path:
    """Write the model and return its folder.

    Args:
        sliding_window: two of the three layers see only so many positions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INNER,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab_size,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id("<|end|>"),
    }
    if sliding_window is not None:
        kinds = ["full_attention", "sliding_attention", "sliding_attention"]
        config |= {"layer_types": kinds, "sliding_window": sliding_window}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    save_file(_weights(np.random.default_rng(seed), vocab_size), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_eagle3(folder: Path, target: Path, seed: int = 0) -> Path:
    """Write an EAGLE-3 drafter for a model of `write`: one layer, fed with the output of all three blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config["vocab_size"],
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    weights = {
        "fc.weight": _matrix(rng, HIDDEN, LAYERS * HIDDEN),
        "norm.weight": _ones(),
        "midlayer.hidden_norm.weight": _ones(),
        **_layer(rng, "midlayer", inputs=2 * HIDDEN),
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    return tokenizer


def _weights(rng: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    """Large enough that greedy text wanders instead of repeating one token."""
    weights = {"model.embed_tokens.weight": _matrix(rng, vocab_size, HIDDEN, 1.0), "model.norm.weight": _ones()}
    for i in range(LAYERS):
        weights |= _layer(rng, f"model.layers.{i}")
    return weights


def _layer(rng: np.random.Generator, name: str, inputs: int = HIDDEN) -> dict[str, np.ndarray]:
    return {
        f"{name}.input_layernorm.weight": _ones(),
        f"{name}.post_attention_layernorm.weight": _ones(),
        f"{name}.self_attn.q_proj.weight": _matrix(rng, HEADS * HEAD_DIM, inputs),
        f"{name}.self_attn.k_proj.weight": _matrix(rng, KV_HEADS * HEAD_DIM, inputs),
        f"{name}.self_attn.v_proj.weight": _matrix(rng, KV_HEADS * HEAD_DIM, inputs),
        f"{name}.self_attn.o_proj.weight": _matrix(rng, HIDDEN, HEADS * HEAD_DIM),
        f"{name}.mlp.gate_proj.weight": _matrix(rng, INNER, HIDDEN),
        f"{name}.mlp.up_proj.weight": _matrix(rng, INNER, HIDDEN),
        f"{name}.mlp.down_proj.weight": _matrix(rng, HIDDEN, INNER),
    }


def _matrix(rng: np.random.Generator, rows: int, columns: int, scale: float = 0.4) -> np.ndarray:
    return (rng.standard_normal((rows, columns)) * scale).astype(np.float32)


def _ones() -> np.ndarray:
    return np.ones((HIDDEN,), np.float32)
