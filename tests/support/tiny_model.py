"""A tiny random Llama as a Hugging Face folder: every byte is a token, weights are seeded, nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, HEAD_DIM = 48, 3, 4, 2, 96, 12
MAX_POSITIONS = 512
VISION_LAYERS, VISION_HIDDEN, PATCH = 2, 16, 4
VISION_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

VISION_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


# Names of tools only: 512 positions have no room for schemas.
TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}<|start|>tool\n{{ t.function.name }}<|end|>{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def write(
    folder: Path,
    seed: int = 0,
    sliding_window: int | None = None,
    more: tuple[str, ...] = (),
    template: str = TEMPLATE,
) -> Path:
    """Write the model and return its folder.

    Args:
        sliding_window: two of the three layers see only so many positions.
        more: special tokens beside its own.
        template: of chats.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(more)
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
        json.dumps({"chat_template": template, "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"})
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


def write_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Write a Qwen2-VL whose text decoder has the sizes of `write`, under the names that Hugging Face's files have."""
    write(folder, seed)
    tokenizer = _tokenizer(VISION_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    start, pad, end, video = map(tokenizer.token_to_id, VISION_TOKENS)
    config = json.loads((folder / "config.json").read_text())
    third = HEAD_DIM // 6
    config |= {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": vocab_size,
        "rope_scaling": {"type": "mrope", "mrope_section": [HEAD_DIM // 2 - 2 * third, third, third]},
        "vision_start_token_id": start,
        "image_token_id": pad,
        "vision_end_token_id": end,
        "video_token_id": video,
        "vision_config": {
            "depth": VISION_LAYERS, "embed_dim": VISION_HIDDEN, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2,
            "patch_size": PATCH, "in_chans": 3,
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": PATCH, "merge_size": 2, "min_pixels": 64, "max_pixels": 4096})
    )
    (folder / "video_preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 64, "longest_edge": 4096}})
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = VISION_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(seed)
    weights = _weights(rng, vocab_size)
    for i in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weights[f"model.layers.{i}.self_attn.{name}_proj.bias"] = _matrix(rng, 1, heads * HEAD_DIM)[0]
    save_file(weights | _vision_weights(rng), folder / "model.safetensors", {"format": "pt"})
    return folder


def _vision_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    width, merged = VISION_HIDDEN, VISION_HIDDEN * 4
    patch = _matrix(rng, width, 3 * 2 * PATCH * PATCH).reshape(width, 3, 2, PATCH, PATCH)
    weights = {"visual.patch_embed.proj.weight": patch}
    for i in range(VISION_LAYERS):
        for name, outputs, inputs in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("mlp.fc1", 2 * width, width),
            ("mlp.fc2", width, 2 * width),
        ):  # fmt: skip
            weights[f"visual.blocks.{i}.{name}.weight"] = _matrix(rng, outputs, inputs)
            weights[f"visual.blocks.{i}.{name}.bias"] = _matrix(rng, 1, outputs)[0]
        for name in ("norm1", "norm2"):
            weights[f"visual.blocks.{i}.{name}.weight"] = np.ones((width,), np.float32)
            weights[f"visual.blocks.{i}.{name}.bias"] = np.zeros((width,), np.float32)
    weights["visual.merger.ln_q.weight"] = np.ones((width,), np.float32)
    weights["visual.merger.ln_q.bias"] = np.zeros((width,), np.float32)
    for name, outputs in (("0", merged), ("2", HIDDEN)):
        weights[f"visual.merger.mlp.{name}.weight"] = _matrix(rng, outputs, merged)
        weights[f"visual.merger.mlp.{name}.bias"] = _matrix(rng, 1, outputs)[0]
    return weights


def _tokenizer(more: tuple[str, ...] = ()) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|start|>", "<|end|>", *more)])
    return tokenizer


def _weights(rng: np.random.Generator, vocab_size: int) -> dict[str, np.ndarray]:
    """Large enough that greedy text wanders instead of repeating one token."""
    weights = {"model.embed_tokens.weight": _matrix(rng, vocab_size, HIDDEN, 1.0), "model.norm.weight": _ones()}
    for i in range(LAYERS):
        weights |= _layer(rng, f"model.layers.{i}")
    return weights


def _layer(rng: np.random.Generator, name: str, inputs: int | None = None) -> dict[str, np.ndarray]:
    inputs = inputs or HIDDEN
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
