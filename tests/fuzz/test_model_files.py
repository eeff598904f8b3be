"""Mutated model files: read or refused with a clear error, without allocating what a lying header asks for."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from shared.errors import BadModel
from shared.gguf_file import read_header
from shared.model_files import ModelFiles
from tests.fuzz.random_messages import damaged
from tests.fuzz.scale import SEED, count
from tests.support import tiny_model
from workers.load.gguf import check_sizes, read_config, read_tensor
from workers.load.loader import load
from workers.safetensors import check_safetensors

MAX_BYTES = 64 * 1024 * 1024
NUMBERS = (0, 1, -1, 2**31, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, None, "7", [], {}, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.write(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 1])
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("token_embd.weight", gguf.quants.quantize(np.ones((3, 32), np.float32), kind), raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones((32, 32), np.float32))
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutated_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Half of them with a header that is still JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.5:
        at = rng.choice((0, 0, 8, rng.randrange(length)))
        return content[:at] + damaged(content[at : at + 64], rng) + content[at + 64 :]
    header = json.loads(content[8 : 8 + length])
    for _ in range(rng.choice((1, 2))):
        name = rng.choice([n for n in header if n != "__metadata__"])
        entry = header[name]
        if not isinstance(entry, dict) or not entry:
            continue
        key = rng.choice(list(entry))
        if isinstance(entry[key], list) and entry[key] and rng.random() < 0.8:
            entry[key][rng.randrange(len(entry[key]))] = rng.choice(NUMBERS)
        else:
            entry[key] = rng.choice((*NUMBERS, "F64", "BOOL", [[]], [2**40] * 50))
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


def read_safetensors(path: Path) -> None:
    check_safetensors(path)


def read_gguf(path: Path) -> None:
    """As `load_gguf` does, without the model."""
    metadata, tensors = read_header(path)
    check_sizes(read_config(metadata, {tensor.name for tensor in tensors}), tensors)
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    for tensor in tensors:
        read_tensor(raw, tensor)


def peak_of(read: Callable[[Path], None], path: Path) -> tuple[int, bool]:
    """(bytes that Python allocated at most, whether the file was refused)."""
    tracemalloc.start()
    try:
        read(path)
        return tracemalloc.get_traced_memory()[1], False
    except BadModel:
        return tracemalloc.get_traced_memory()[1], True
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_mutated_file_is_read_or_refused(kind: str, folder: Path, gguf_file: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    original = (gguf_file if kind == "gguf" else folder / "model.safetensors").read_bytes()
    path = tmp_path / f"mutated.{kind}"
    num_refused = 0
    for number in range(count(100, 1000)):
        if kind == "gguf":
            at = rng.randrange(min(len(original), 1400))
            content = original[:at] + damaged(original[at : at + 24], rng) + original[at + 24 :]
        else:
            content = mutated_safetensors(original, rng)
        path.write_bytes(content)
        peak, is_refused = peak_of(read_gguf if kind == "gguf" else read_safetensors, path)
        assert peak < MAX_BYTES, f"file {number} had {peak} bytes allocated"
        num_refused += is_refused
    assert num_refused > count(30, 300)


@pytest.mark.mlx
@pytest.mark.parametrize(
    "key", ["embedding_length", "feed_forward_length", "block_count", "attention.head_count", "vocab_size"]
)
def test_sizes_that_the_file_cannot_hold_are_refused_before_the_model_is_built(
    key: str, gguf_file: Path, tmp_path: Path
) -> None:
    content = gguf_file.read_bytes()
    name = f"llama.{key}".encode()
    at = content.find(name)
    path = tmp_path / "m.gguf"
    if at < 0:  # counted from the tokens
        path.write_bytes(content)
        assert read_config(read_header(path)[0], set())["vocab_size"] == 3
        return
    at += len(name) + 4
    path.write_bytes(content[:at] + struct.pack("<I", 2**31 - 64) + content[at + 4 :])
    tracemalloc.start()
    try:
        with pytest.raises(BadModel):
            load(ModelFiles(name="m", gguf=path), "float32")
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
