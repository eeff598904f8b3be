"""Safetensors files: whether one is whole, before anything is read or allocated for it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from shared.errors import BadModel

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit

_DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4,
}  # fmt: skip


def check_safetensors(path: Path) -> None:
    """The header must describe exactly the bytes that follow it, so that nothing is allocated for a damaged file.

    Source: the format's description, https://github.com/huggingface/safetensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise BadModel(f"{path.name} is not a safetensors file, or is cut short")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((_tensor_end(name, entry) for name, entry in tensors.items()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadModel(f"{path.name} has a malformed header: {error}") from error
    if end != size - 8 - length:
        raise BadModel(f"{path.name} is cut short: {size} bytes, its header describes {end + 8 + length}")


def _tensor_end(name: str, entry: dict[str, Any]) -> int:
    first, end = entry["data_offsets"]
    bits = _DTYPE_BITS.get(entry["dtype"])
    if bits is None:
        raise ValueError(f"tensor {name!r} has unknown dtype {entry['dtype']!r}")
    if any(n < 0 for n in entry["shape"]) or (end - first) * 8 != math.prod(entry["shape"]) * bits:
        raise ValueError(f"tensor {name!r} of shape {entry['shape']} does not fill its {end - first} bytes")
    return int(end)
