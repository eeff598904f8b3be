"""One checkpoint to another: read lazily, packed or cast, written shard by shard, so that memory holds one shard."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import dequantize_model, get_total_parameters, make_shards, quantize_model, save_config
from msgspec import Struct

from shared.errors import BadConfig, BadModel
from workers.convert.quantization import Quantization, is_encoder, rule_for
from workers.load.folder import load_folder, weight_files
from workers.load.loader import cast
from workers.machine import DTYPES

SHARD_GIB = 5
# What a model needs beside its weights. Code is left where it is: nothing here would run it.
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_NOT_COPIED = frozenset({"config.json", "model.safetensors.index.json", "hf_quant_config.json"})

OnShard = Callable[[int, int], None]
"""(bytes written, bytes in all)"""


class Converted(Struct, frozen=True, kw_only=True):
    num_bytes: int  # of the weights
    num_parameters: int
    num_encoder_tensors: int  # of vision and audio, copied as they were
    is_text_only: bool  # the source can see or hear, and the architecture's definition here has text alone

    @property
    def bits_per_weight(self) -> float:
        """Scales, biases and layers that are not packed included."""
        return 8 * self.num_bytes / self.num_parameters if self.num_parameters else 0.0


def convert(
    source: Path,
    target: Path,
    quantization: Quantization | None = None,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    on_shard: OnShard = lambda done, total: None,
) -> Converted:
    """Write the checkpoint in the folder `source` to the empty folder `target`.

    Args:
        quantization: how the text decoder's matrices are packed; None leaves them.
        dtype: of all other floating-point weights; None leaves them.
        dequantize: packed weights become plain ones.
    Raises:
        BadConfig: the options contradict each other or the source, or the disk is too small.
        BadModel: the source cannot be read.
    """
    if quantization is not None:
        quantization.check_mlx()
    model, config = load_folder(source, 0)
    if (config.get("quantization_config") or {}).get("quant_method") == "fp8":
        del config["quantization_config"]  # such matrices were unpacked when they were read
    is_packed = any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))
    if quantization is not None and is_packed:
        raise BadConfig(f"{source.name} is quantised already: dequantise it first, and know that its loss stays")
    if dequantize and not is_packed:
        raise BadConfig(f"{source.name} is not quantised")
    if dequantize:
        _dequantize(model, config)
    if dtype is not None:
        cast(model, DTYPES[dtype])
        for part in (config, config.get("text_config") or {}):
            part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    if quantization is not None:
        config = _quantize(model, config, quantization)
    encoders = _encoder_tensors(source, model, DTYPES[dtype] if dtype is not None else None)
    weights = {n: w for n, w in tree_flatten(model.parameters()) if not is_encoder(n)} | encoders
    num_parameters = get_total_parameters(model)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))  # what is written can be freed
    num_bytes = _write(weights, target, on_shard)
    is_text_only = "vision_config" in config and not encoders
    save_config(config, target / "config.json", keep_vision_config=not is_text_only)
    _copy_files(source, target)
    return Converted(
        num_bytes=num_bytes,
        num_parameters=num_parameters,
        num_encoder_tensors=len(encoders),
        is_text_only=is_text_only,
    )


def _quantize(model: nn.Module, config: dict[str, Any], how: Quantization) -> dict[str, Any]:
    """Pack the layers, lazily; the configuration says how."""
    bits, group_size = how.packing
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its bits per weight
        _, config = quantize_model(model, config, group_size, bits, mode=how.mode, quant_predicate=rule_for(model, how))
    if not any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
        raise BadModel(f"no layer of {config['model_type']} has rows that groups of {group_size} weights divide")
    return config


def _dequantize(model: nn.Module, config: dict[str, Any]) -> None:
    dequantize_model(model)
    for part in (config, config.get("text_config") or {}):
        part.pop("quantization", None)
        part.pop("quantization_config", None)


def _encoder_tensors(source: Path, model: nn.Module, dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """Vision and audio as the checkpoint has them, so that every reader of such checkpoints finds what it knows."""
    own = next((name for name, _ in tree_flatten(model.parameters()) if is_encoder(name)), None)
    if own is None:
        return {}
    prefix = "model." if own.startswith("model.") else ""  # as the model, and mlx-lm's of its kind, have them
    found: dict[str, mx.array] = {}
    for path in weight_files(source):
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict), "safetensors hold named arrays"
        for name, array in tensors.items():
            if is_encoder(name):
                kept = array if dtype is None or not mx.issubdtype(array.dtype, mx.floating) else array.astype(dtype)
                found[prefix + name.removeprefix("model.")] = kept
    return found


def _write(weights: dict[str, mx.array], target: Path, on_shard: OnShard) -> int:
    """The shards and their index. Returns the weights' bytes."""
    total = sum(array.nbytes for array in weights.values())
    free = shutil.disk_usage(target).free
    if total > free:
        raise BadConfig(f"{target} needs {total / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free")
    shards: list[dict[str, mx.array]] = make_shards(weights, SHARD_GIB)
    weights.clear()
    place: dict[str, str] = {}
    done, num_shards = 0, len(shards)
    for i in range(num_shards):
        shard, shards[i] = shards[i], {}
        name = "model.safetensors" if num_shards == 1 else f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors"
        mx.save_safetensors(str(target / name), shard, metadata={"format": "mlx"})  # evaluates the shard
        done += sum(array.nbytes for array in shard.values())
        place |= dict.fromkeys(shard, name)
        on_shard(done, total)
    _write_index(target, place, total)
    return total


def _write_index(target: Path, place: dict[str, str], total: int) -> None:
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _copy_files(source: Path, target: Path) -> None:
    """Tokenizer, templates, processors, generation defaults; also in folders, as sentence-transformers have them."""
    for path in sorted(source.rglob("*")):
        inner = path.relative_to(source)
        if path.is_file() and path.suffix in COPIED and not any(part.startswith(".") for part in inner.parts):
            if inner.parts[0] in _NOT_COPIED:
                continue
            (target / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inner)
