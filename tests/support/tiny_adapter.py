"""LoRA adapters with random weights, in the two forms that are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Sizes = Mapping[str, tuple[int, int]]
"""A projection's name -> its (in, out)."""


def write_peft(folder: Path, sizes: Sizes, rank: int = 4, alpha: float = 8.0, seed: int = 0, **config: Any) -> Path:
    """As PEFT saves one. `config` goes into adapter_config.json."""
    tensors = {}
    for path, (a, b) in _pairs(sizes, rank, seed).items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{path}.lora_B.weight"] = np.ascontiguousarray(b.T)
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "use_dora": False, **config}
    return _write(folder, described, "adapter_model", tensors)


def write_mlx(folder: Path, sizes: Sizes, rank: int = 4, scale: float = 2.0, seed: int = 0, **config: Any) -> Path:
    """As mlx-lm saves one, of all layers."""
    tensors = {}
    for path, (a, b) in _pairs(sizes, rank, seed).items():
        tensors |= {f"{path}.lora_a": a, f"{path}.lora_b": b}
    keys = sorted({path.split(".", 3)[-1] for path in sizes})
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    described = {"fine_tune_type": "lora", "num_layers": 1000, "lora_parameters": parameters, **config}
    return _write(folder, described, "adapters", tensors)


def _pairs(sizes: Sizes, rank: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A (in, rank) and B (rank, out), large enough to change a greedy text."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 0.2).astype(np.float32)

    return {path: (matrix(size_in, rank), matrix(rank, size_out)) for path, (size_in, size_out) in sizes.items()}


def _write(folder: Path, config: dict[str, Any], name: str, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / f"{name}.safetensors", {"format": "pt"})
    return folder
