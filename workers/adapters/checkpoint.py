"""Adapter checkpoints: PEFT's folders and those of mlx-lm and mlx-vlm."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared import model_files
from shared.errors import BadModel
from workers.fingerprint import fingerprint
from workers.safetensors import check_safetensors

CONFIG = "adapter_config.json"
MAX_RANK = 1024


@dataclass(frozen=True)
class Adapter:
    """`pairs`: by the projection's name in the checkpoint, A (in, r) and B (r, out) with the scale in it, lazy."""

    name: str
    pairs: dict[str, tuple[mx.array, mx.array]]
    fingerprint: str

    @property
    def rank(self) -> int:
        """The widest pair's."""
        return max(a.shape[1] for a, _ in self.pairs.values())


def read(name: str, place: str) -> Adapter:
    """Args:
        place: a folder or a Hugging Face id.
    Raises:
        BadModel: it cannot be found or downloaded, is damaged, or is of a kind that is not supported.
    """
    try:
        folder = model_files.adapter_folder(place)
        config = _config(folder)
        read_pairs, file = (_peft_pairs, "adapter_model") if "peft_type" in config else (_mlx_pairs, "adapters")
        path = folder / f"{file}.safetensors"
        if not path.is_file():
            raise BadModel(f"{folder} holds no {path.name}")
        check_safetensors(path)
        tensors = mx.load(str(path))
        assert isinstance(tensors, dict), "safetensors hold arrays by name"
        pairs = read_pairs(config, tensors)
        if not pairs:
            raise BadModel(f"{path.name} holds no adapter")
        for key, (a, b) in pairs.items():
            if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or not 1 <= a.shape[1] <= MAX_RANK:
                raise BadModel(f"{key} has a pair of shapes {a.shape} and {b.shape}; that is not supported")
        return Adapter(name, pairs, fingerprint([path], config, ""))
    except BadModel as error:
        raise BadModel(f"adapter {name!r}: {error.message}") from error
    except OSError as error:
        raise BadModel(f"adapter {name!r}: {error}") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadModel(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise BadModel(f"{folder / CONFIG} is not an object")
    return config


def _number(config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise BadModel(f"{CONFIG}: {key} is {value!r}, not a number")
    return float(value)


# ------------------------------------------------ mlx-lm, mlx-vlm


def _mlx_pairs(config: dict[str, Any], tensors: dict[str, mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """`path.lora_a` (in, r) and `path.lora_b` (r, out); the sum is multiplied by `scale`."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise BadModel(f"fine_tune_type {kind!r} is not supported, only 'lora' is")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise BadModel(f"{CONFIG} has neither peft_type nor lora_parameters")
    scale = _number(parameters, "scale")
    pairs = _paired(tensors, re.compile(r"(.+)\.lora_(a|b)"))
    return {key: (a, b * scale) for key, (a, b) in pairs.items()}


# ------------------------------------------------ PEFT

# Options with which PEFT computes something else than W x + B A x, and the values with which it does not.
_PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model too
}


def _peft_pairs(config: dict[str, Any], tensors: dict[str, mx.array]) -> dict[str, tuple[mx.array, mx.array]]:
    """`base_model.model.PATH.lora_A.weight` (r, in) and `lora_B.weight` (out, r); the sum is multiplied by alpha / r.

    Source: PEFT's description of its checkpoint format, https://huggingface.co/docs/peft/developer_guides/checkpoint.
    """
    if config["peft_type"] != "LORA":
        raise BadModel(f"peft_type {config['peft_type']!r} is not supported, only 'LORA' is")
    for option, plain in _PEFT_PLAIN.items():
        if config.get(option) not in plain:
            raise BadModel(f"{option} = {config[option]!r} is not supported")
    scale_of = _peft_scale(config)
    pairs = _paired(tensors, re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight"))
    return {key: (a.T, b.T * scale_of(key, a.shape[0])) for key, (a, b) in pairs.items()}


def _peft_scale(config: dict[str, Any]) -> Callable[[str, int], float]:
    """(module, rank) -> what its sum is multiplied by."""
    alpha = _number(config, "lora_alpha")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise BadModel(f"{CONFIG}: alpha_pattern is not an object")
    try:
        alphas = {pattern: _number(patterns, pattern) for pattern in patterns}
    except BadModel as error:
        raise BadModel(f"{error.message} (in alpha_pattern)") from error
    try:
        compiled = {re.compile(rf"(.*\.)?({pattern})"): value for pattern, value in alphas.items()}
    except re.error as error:
        raise BadModel(f"{CONFIG}: alpha_pattern: {error}") from error
    is_stabilised = bool(config.get("use_rslora"))

    def scale(key: str, rank: int) -> float:
        own = next((value for pattern, value in compiled.items() if pattern.fullmatch(key)), alpha)
        return own / (math.sqrt(rank) if is_stabilised else rank)

    return scale


def _paired(tensors: dict[str, mx.array], name: re.Pattern[str]) -> dict[str, tuple[mx.array, mx.array]]:
    """Both halves of each pair. Raises BadModel: something has another name, or no other half."""
    halves: dict[str, dict[str, mx.array]] = {}
    for key, tensor in tensors.items():
        match = name.fullmatch(key)
        if match is None:
            raise BadModel(f"tensor {key!r} is no part of a LoRA pair; that is not supported")
        halves.setdefault(match[1], {})[match[2].lower()] = tensor
    for key, found in halves.items():
        if len(found) != 2:
            raise BadModel(f"{key} has one half of a pair only")
    return {key: (found["a"], found["b"]) for key, found in halves.items()}
