"""A training run's state in one file of at most 60 MB, so that it can be moved and resumed.

Where float32 does not fit, momentum is stored coarser first (it forgets itself within 20 steps), then the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

MAX_BYTES = 60_000_000


def save(path: Path, params: dict[str, mx.array], state: dict[str, mx.array], facts: dict[str, Any]) -> None:
    """Writes the whole file or nothing."""
    arrays: dict[str, mx.array] = {}
    for stored in ("exact", "half", "small"):
        arrays = _pack(params, state, stored)
        if sum(a.nbytes for a in arrays.values()) <= MAX_BYTES:
            break
    draft = path.with_name(path.name + ".part.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(draft), arrays, {"facts": json.dumps(facts)})
    draft.replace(path)


def load(path: Path) -> tuple[dict[str, mx.array], dict[str, mx.array], dict[str, Any]]:
    """(parameters, optimiser state, facts), float32 again."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays: dict[str, mx.array] = loaded[0]
    metadata: dict[str, str] = loaded[1]
    params = {n.removeprefix("p/"): a.astype(mx.float32) for n, a in arrays.items() if n.startswith("p/")}
    state: dict[str, mx.array] = {}
    for name, array in arrays.items():
        if name.startswith("s/"):
            scale = arrays.get("scale/" + name[2:])
            state[name[2:]] = array.astype(mx.float32) * (1.0 if scale is None else scale)
    mx.eval(params, state)
    return params, state, json.loads(metadata["facts"])


def _pack(params: dict[str, mx.array], state: dict[str, mx.array], stored: str) -> dict[str, mx.array]:
    packed: dict[str, mx.array] = {}
    for name, value in params.items():
        packed["p/" + name] = value.astype(mx.bfloat16) if stored == "small" and value.ndim == 2 else value
    for name, value in state.items():
        if stored == "exact" or value.ndim < 2:
            packed["s/" + name] = value
        elif stored == "half":
            packed["s/" + name] = value.astype(mx.bfloat16)
        else:
            scale = mx.maximum(mx.abs(value).max(axis=1, keepdims=True), 1e-30) / 127
            packed["s/" + name] = mx.round(value / scale).astype(mx.int8)
            packed["scale/" + name] = scale
    return packed
