"""From model files to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from shared.errors import BadModel
from shared.model_files import ModelFiles
from workers import adapters
from workers.adapters import Adapters
from workers.fingerprint import fingerprint
from workers.load.folder import load_folder
from workers.load.gguf import load_gguf
from workers.models.base import TextModel
from workers.models.own import adapted_to_caches, is_own

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
DEFAULT_MAX_MODEL_LEN = 4096  # for a configuration that does not tell its context length

_LENGTH_KEYS = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "n_positions", "n_ctx", "seq_length")


@dataclass(frozen=True)
class LoadedModel:
    """A model on the device, its weights evaluated. `config` has Hugging Face's names, also for a GGUF."""

    model: TextModel
    config: dict[str, Any]
    name: str
    architecture: str
    fingerprint: str
    eos_token_ids: list[int]
    max_model_len: int
    vocab_size: int
    dtype: str
    adapters: Adapters | None = None


def load(
    files: ModelFiles,
    dtype: str,
    trust_remote_code: bool = False,
    max_model_len: int = 0,
    adapter_places: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Read `files`.

    On the CPU, quantised weights are dequantised and "auto" means float32: nothing else is fast there. On a GPU "auto"
    is the checkpoint's own type, bfloat16 for a GGUF.

    Args:
        dtype: "auto" or one of DTYPES, of weights, activations and caches.
        trust_remote_code: must be False; no code is ever imported from a model's folder.
        max_model_len: longest sequence that will be served, 0 for the model's own limit; some position embeddings
            depend on it.
        adapter_places: LoRA adapters to be served with it: name -> folder or Hugging Face id.
    Raises:
        BadModel: the files are damaged, describe an unknown architecture, or do not fit their own description.
    """
    if trust_remote_code:
        raise BadModel("TANDEM_TRUST_REMOTE_CODE: loading code from a model's folder is not supported")
    is_cpu = mx.default_device() == mx.Device(mx.cpu)
    if files.gguf is not None:
        model, config = load_gguf(files.gguf, max_model_len)
        stored = mx.bfloat16
        paths = [files.gguf]
    elif files.folder is not None:
        model, config = load_folder(files.folder, max_model_len)
        stored = _checkpoint_dtype(model)
        paths = sorted(files.folder.glob("*.safetensors"))
    else:
        raise BadModel(f"{files.name}: neither a folder nor a GGUF file")
    compute = DTYPES[dtype] if dtype != "auto" else mx.float32 if is_cpu else stored
    cast(model, compute)
    if is_cpu:
        _dequantize(model)
        cast(model, compute)
    added = adapters.install(model, adapter_places, compute) if adapter_places else None
    if hasattr(model, "fuse"):
        model.fuse()
    mx.eval(model.parameters())
    model.eval()
    ready: TextModel = model if is_own(model) else adapted_to_caches(model, config["model_type"])
    name = next(key for key, value in DTYPES.items() if value == compute)
    return LoadedModel(
        model=ready,
        config=config,
        name=files.name,
        architecture=str(config["model_type"]),
        fingerprint=fingerprint(paths, config, name),
        eos_token_ids=_eos_token_ids(config),
        max_model_len=_max_model_len(config),
        vocab_size=ready.vocab_size,
        dtype=name,
        adapters=added,
    )


def _checkpoint_dtype(model: nn.Module) -> mx.Dtype:
    """The type most floating-point elements are stored in; for packed weights, that of their scales."""
    sizes: dict[mx.Dtype, int] = {}

    def count(_path: str, array: mx.array) -> None:
        if array.dtype in DTYPES.values():
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size

    tree_map_with_path(count, model.parameters())
    return max(sizes, key=lambda dtype: sizes[dtype], default=mx.bfloat16)


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Lazily: nothing is read from disk here. mlx-lm's models name parameters that must keep their type."""
    may_cast = getattr(model, "cast_predicate", None) or (lambda _path: True)

    def converted(path: str, array: mx.array) -> mx.array:
        is_wanted = mx.issubdtype(array.dtype, mx.floating) and (dtype == mx.float32 or may_cast(path))
        return array.astype(dtype) if is_wanted else array

    model.update(tree_map_with_path(converted, model.parameters()))


def _dequantize(model: nn.Module) -> None:
    from mlx_lm.utils import dequantize_model

    dequantize_model(model)


def _eos_token_ids(config: dict[str, Any]) -> list[int]:
    found = config.get("eos_token_id")
    if found is None:
        found = config.get("text_config", {}).get("eos_token_id")
    if found is None:
        return []
    return [int(i) for i in found] if isinstance(found, list) else [int(found)]


def _max_model_len(config: dict[str, Any]) -> int:
    """The context length that the configuration tells; YaRN stretches the one it names as original."""
    for part in (config, config.get("text_config") or {}):
        scaling = part.get("rope_parameters") or part.get("rope_scaling") or {}
        length = next((int(part[key]) for key in _LENGTH_KEYS if part.get(key)), 0)
        original = scaling.get("original_max_position_embeddings")
        if "yarn" in str(scaling.get("rope_type") or scaling.get("type")) and original and scaling.get("factor"):
            length = max(length, int(original * scaling["factor"]))
        if length:
            return length
    return DEFAULT_MAX_MODEL_LEN
