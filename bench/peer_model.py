"""The embedded model as a Hugging Face folder in float32, which every server can load.

`python -m bench.peer_model` prints the folder. The peers cannot compute fast with the GGUF itself on a CPU: its 16-bit
scales make their activations 16 bits wide, which MLX's CPU back end does without BLAS.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from shared.config import Settings, load
from shared.errors import BadModel
from shared.model_files import resolve

CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def folder_for(model: str, settings: Settings) -> Path:
    """A Hugging Face folder of `model`: its own, or one built once from its GGUF in the cache folder.

    Raises:
        BadModel: no such model, or a GGUF that is not a Llama with a byte-level BPE tokenizer.
    """
    files = resolve(model, settings)
    if files.folder is not None:
        return files.folder
    assert files.gguf is not None, "resolve gives a folder or a GGUF"
    folder = settings.cache_folder / "peers" / "models" / f"{files.gguf.stem}-float32"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder) + ".lock"):
        if not (folder / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
                convert(files.gguf, Path(draft) / "model")
                (Path(draft) / "model").replace(folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json, the tokenizer with its chat template, and model.safetensors.

    Raises:
        BadModel: not a Llama with a byte-level BPE tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise BadModel(f"{gguf} is not a Llama with a byte-level BPE tokenizer")
    folder.mkdir(parents=True)
    tensors = _tensors(reader, fields)
    _write_tokenizer(fields, folder)
    _write_weights(tensors, folder)
    _write_config(fields, folder, is_tied="lm_head.weight" not in tensors)


def _tensors(reader: Any, fields: dict[str, Any]) -> dict[str, NDArray[np.float32]]:  # noqa: ANN401 - untyped package
    from gguf.quants import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in OTHER_NAMES:
            tensors[OTHER_NAMES[tensor.name]] = values
            continue
        _, layer, kind, suffix = tensor.name.split(".")
        if kind in heads:
            values = unpermute(values, heads[kind])
        tensors[f"model.layers.{layer}.{LAYER_NAMES[kind]}.{suffix}"] = values
    return tensors


def unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Undoes llama.cpp's reordering of query and key rows.

    Rotary pairs lie next to each other in a GGUF (rows 2i, 2i+1 of a head), half a head apart in Hugging Face's layout
    (rows i, i + head_dim / 2).

    Args:
        weight: (num_heads * head_dim, hidden).
    Source: inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def _write_weights(tensors: dict[str, NDArray[np.float32]], folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _write_config(fields: dict[str, Any], folder: Path, *, is_tied: bool) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "max_position_embeddings": fields["llama.context_length"],
        "vocab_size": fields["llama.vocab_size"],
        "tie_word_embeddings": is_tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    generation = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Byte-level BPE as the GGUF's `tokenizer.ggml.pre` names it; "smollm" splits digits one by one first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if fields["tokenizer.ggml.pre"] == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [AddedToken(t, special=True) for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=fields["llama.context_length"],
    )
    wrapped.chat_template = fields["tokenizer.chat_template"]
    wrapped.save_pretrained(str(folder))


if __name__ == "__main__":
    print(folder_for(sys.argv[1] if len(sys.argv) > 1 else "default", load()))
