"""GGUF files: configuration from the metadata, names mapped to Hugging Face's, weights dequantised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from shared.errors import BadModel
from shared.gguf_file import GgufTensor, read_header
from workers.models import decoder

# general.architecture -> model_type. Mistral's files say "llama".
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: Path, max_model_len: int) -> tuple[nn.Module, dict[str, Any]]:
    """A model with its weights in float16 or float32, and its configuration under Hugging Face's names.

    Raises:
        BadModel: as `load` says.
    """
    metadata, tensors = read_header(path)
    names = {tensor.name for tensor in tensors}
    config = read_config(metadata, names)
    check_sizes(config, tensors)
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    factors = next((read_tensor(raw, t) for t in tensors if t.name == _ROPE_FACTORS), None)
    if factors is not None:
        # Llama 3.1's scaling, stored as one divisor per frequency: what longrope's factors are.
        ones = [float(f) for f in factors]
        config["rope_scaling"] = {
            "rope_type": "longrope", "short_factor": ones, "long_factor": ones, "attention_factor": 1.0,
            "original_max_position_embeddings": config["max_position_embeddings"],
        }  # fmt: skip
    model = decoder.Model(decoder.DecoderConfig.from_hf(config, max_model_len))
    weights: dict[str, mx.array] = {}
    for tensor in tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        name = hf_name(tensor.name)
        values = read_tensor(raw, tensor)
        if config["model_type"] == "llama" and ".self_attn." in name and name.split(".")[4] in ("q_proj", "k_proj"):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            values = unpermute(values, heads)
        weights[name] = mx.array(values)
    check_weights(model, weights, path.name)
    model.load_weights(list(weights.items()))
    return model, config


def read_config(metadata: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Hugging Face's config.json as the metadata tells it.

    Args:
        names: of all tensors; a file without `output.weight` ties its head to the embeddings.
    Raises:
        BadModel: something is missing, of a wrong type, or not supported.
    """
    try:
        return _read_config(metadata, names)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise BadModel(f"the GGUF file's metadata is malformed: {error}") from error


def _read_config(metadata: dict[str, Any], names: set[str]) -> dict[str, Any]:
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BadModel(f"GGUF architecture {architecture!r} is not supported (these are: {known})")
    if metadata.get(f"{architecture}.expert_count"):
        raise BadModel(f"GGUF architecture {architecture!r} with experts is not supported")

    def need(key: str) -> Any:  # noqa: ANN401 - a number or a list
        value = metadata.get(f"{architecture}.{key}")
        if value is None:
            raise BadModel(f"the GGUF file lacks {architecture}.{key}")
        return value

    def get(key: str) -> Any:  # noqa: ANN401 - a number, a text or nothing
        return metadata.get(f"{architecture}.{key}")

    heads = int(need("attention.head_count"))
    vocab = get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", []))
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "hidden_size": int(need("embedding_length")),
        "num_hidden_layers": int(need("block_count")),
        "intermediate_size": int(need("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv") or heads),
        "head_dim": int(get("attention.key_length") or need("embedding_length") // heads),
        "rms_norm_eps": float(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": float(get("rope.freq_base") or 10000.0),
        "max_position_embeddings": int(need("context_length")),
        "vocab_size": int(vocab),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": architecture != "qwen2" and "blk.0.attn_q.bias" in names,
    }
    eos = [metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    config["eos_token_id"] = sorted({int(i) for i in eos if i is not None})
    rotated = get("rope.dimension_count")
    if rotated is not None and rotated != config["head_dim"]:
        raise BadModel(f"{architecture}.rope.dimension_count {rotated} differs from the head size {config['head_dim']}")
    kind = get("rope.scaling.type")
    if kind not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": kind,
            "factor": float(need("rope.scaling.factor")),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
        }
    return config


def check_sizes(config: dict[str, Any], tensors: list[GgufTensor]) -> None:
    """The sizes that the metadata tells must be those of the tensors: the model is built from them, before any weight.

    Raises:
        BadModel: naming the first that is not.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if head_dim < 2 or head_dim % 2 or kv_heads < 1 or heads % kv_heads:
        raise BadModel(f"the GGUF file tells of {heads} heads, {kv_heads} of them for keys, of size {head_dim}")
    num_blocks = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    if config["num_hidden_layers"] != num_blocks:
        raise BadModel(f"the GGUF file tells of {config['num_hidden_layers']} blocks and holds {num_blocks}")
    for name, wanted in (
        ("token_embd.weight", (config["vocab_size"], hidden)),
        ("blk.0.attn_q.weight", (heads * head_dim, hidden)),
        ("blk.0.attn_k.weight", (kv_heads * head_dim, hidden)),
        ("blk.0.ffn_gate.weight", (inner, hidden)),
    ):
        if shapes.get(name) != wanted:
            raise BadModel(f"GGUF tensor {name!r} has shape {shapes.get(name)}, not {wanted}")


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    Raises:
        BadModel: no layer of these architectures has such a tensor.
    """
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[1].isdigit() and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise BadModel(f"unknown GGUF tensor {name!r}")


def read_tensor(raw: np.ndarray, tensor: GgufTensor) -> np.ndarray:
    """The values of one tensor, float32, or float16 where they are stored so.

    Args:
        raw: the file's bytes.
    Raises:
        BadModel: unknown type, or the data lies outside the file.
    """
    try:
        kind = gguf.GGMLQuantizationType(tensor.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise BadModel(f"GGUF tensor {tensor.name!r} has unknown type {tensor.kind}") from error
    count = math.prod(tensor.shape)
    if not tensor.shape or tensor.shape[-1] % block:
        raise BadModel(f"GGUF tensor {tensor.name!r}: rows of {tensor.shape[-1:]} are not whole blocks of {block}")
    end = tensor.offset + count // block * block_bytes
    if end > raw.size:
        raise BadModel(f"the GGUF file is cut short: tensor {tensor.name!r} ends at byte {end} of {raw.size}")
    data = np.asarray(raw[tensor.offset : end])
    match kind:
        case gguf.GGMLQuantizationType.F32:
            return data.view(np.float32).reshape(tensor.shape)
        case gguf.GGMLQuantizationType.F16:
            return data.view(np.float16).reshape(tensor.shape)
        case gguf.GGMLQuantizationType.Q4_0 | gguf.GGMLQuantizationType.Q4_1 | gguf.GGMLQuantizationType.Q8_0:
            return _unpack(data.reshape(-1, block_bytes), kind).reshape(tensor.shape)
    try:
        values: np.ndarray = gguf.quants.dequantize(data.reshape(*tensor.shape[:-1], -1), kind)
    except NotImplementedError as error:
        raise BadModel(f"GGUF tensor {tensor.name!r} has type {kind.name}, which is not supported") from error
    return values.reshape(tensor.shape)


def _unpack(blocks: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Blocks of 32 weights: a float16 scale, for Q4_1 a float16 minimum, then the integers.

    In one go per tensor; the gguf package works through 16 rows at a time.
    Source: ggml's block_q4_0, block_q4_1 and block_q8_0. Low nibbles are weights 0-15, high nibbles 16-31.
    """
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return blocks[:, 2:].view(np.int8).astype(np.float32) * scale
    head = 4 if kind == gguf.GGMLQuantizationType.Q4_1 else 2
    values = np.empty((len(blocks), 32), dtype=np.float32)
    np.multiply(blocks[:, head:] & 15, scale, out=values[:, :16])
    np.multiply(blocks[:, head:] >> 4, scale, out=values[:, 16:])
    if kind == gguf.GGMLQuantizationType.Q4_1:
        values += np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
    else:
        values -= 8 * scale
    return values


def unpermute(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection back in Hugging Face's order.

    For "llama", GGUF keeps the two halves of a head interleaved (pairs 2i, 2i+1 rotate together).
    """
    rows, half = values.shape[0], values.shape[0] // num_heads // 2
    return values.reshape(num_heads, half, 2, *values.shape[1:]).swapaxes(1, 2).reshape(rows, *values.shape[1:])


def check_weights(model: nn.Module, weights: dict[str, mx.array], source: str) -> None:
    """Every parameter must be there in its shape, and nothing else.

    Raises:
        BadModel: naming the first few that are not.
    """
    from mlx.utils import tree_flatten

    wanted = {name: array.shape for name, array in tree_flatten(model.parameters())}
    wrong = [f"{name} is missing" for name in sorted(wanted.keys() - weights.keys())]
    wrong += [f"{name} is not part of the model" for name in sorted(weights.keys() - wanted.keys())]
    wrong += [
        f"{name} has shape {weights[name].shape}, not {wanted[name]}"
        for name in sorted(wanted.keys() & weights.keys())
        if weights[name].shape != wanted[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BadModel(f"{source}: " + "; ".join(wrong[:5]) + more)
