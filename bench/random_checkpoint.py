"""A checkpoint with random weights in the shape of a real model, with the embedded model's tokenizer, for servers.

    python -m bench.random_checkpoint --shape 8b --out folder

What a step costs does not depend on the values, so a machine without access to a real 8B model can measure servers with
this one. Rows of the head beyond the tokenizer's vocabulary are zero: every token that is put out has a text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from bench import peer_model, report
from bench.model_shapes import SHAPES
from shared.config import load

SHARD_BYTES = 4 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(shape: str, dtype: str, tokenizer: Path, folder: Path) -> int:
    """Write config.json, the tokenizer's files and safetensors.

    Args:
        tokenizer: a Hugging Face folder.
    Returns:
        Bytes of the weights.
    Raises:
        ValueError: not a Llama's shape, whose names mlx-lm and Hugging Face share.
    """
    config = SHAPES[shape]
    if config["model_type"] != "llama":
        raise ValueError(f"shape {shape} is a {config['model_type']}; checkpoints are made of Llama shapes only")
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    known = json.loads((tokenizer / "config.json").read_text())
    ids = {name: known[name] for name in TOKEN_IDS if name in known}
    vocab_size = int(known["vocab_size"])
    config = {
        **config, **ids, "vocab_size": max(vocab_size, int(config["vocab_size"])), "torch_dtype": dtype,
        "architectures": ["LlamaForCausalLM"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=1))
    total = 0
    shard: dict[str, mx.array] = {}
    names: dict[str, str] = {}
    for name, array in _tensors(config, getattr(mx, dtype), vocab_size):
        shard[name] = array
        total += array.nbytes
        if sum(a.nbytes for a in shard.values()) >= SHARD_BYTES:
            _save(folder, shard, names)
    if shard:
        _save(folder, shard, names)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _tensors(config: dict[str, Any], dtype: mx.Dtype, vocab_size: int) -> Iterator[tuple[str, mx.array]]:
    """Each on its own, so that memory holds one shard and no model."""
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    model = llama.Model(llama.ModelArgs.from_dict(config))
    for name, array in tree_flatten(model.parameters()):  # lazy: none of its values is computed
        if array.ndim < 2:
            value = mx.ones(array.shape, dtype)
        else:
            value = (mx.random.normal(array.shape) * 0.02).astype(dtype)
            if name == head:
                value[vocab_size:] = 0
        mx.eval(value)
        yield name, value


def _save(folder: Path, shard: dict[str, mx.array], names: dict[str, str]) -> None:
    file = f"model-{len(set(names.values())) + 1:05d}.safetensors"
    mx.save_safetensors(str(folder / file), shard, metadata={"format": "pt"})
    names.update(dict.fromkeys(shard, file))
    shard.clear()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokenizer", default="default", help="model whose tokenizer is taken")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    mx.random.seed(0)
    started = time.perf_counter()
    written = write(options.shape, options.dtype, peer_model.folder_for(options.tokenizer, load()), options.out)
    report.print_last_line({"folder": str(options.out), "bytes": written, "seconds": time.perf_counter() - started})
    return 0


if __name__ == "__main__":
    sys.exit(main())
