"""What a GGUF file says before its data: the key-value pairs (configuration, tokenizer, chat template) and the tensors.

`gguf.GGUFReader` takes 5 s for the 49,152 tokens and 48,900 merges of SmolLM2 (an array object for every string); this
reader takes 0.1 s, and a process must be back quickly after a restart.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

from shared.errors import BadModel

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # of nested arrays


class _Cursor:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize("<" + code) * count
        if count < 0 or self.at + size > len(self.data):
            raise BadModel("the GGUF file is cut short")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.at)
        self.at += size
        return values

    def string(self) -> str:
        (length,) = self.scalars("Q", 1)
        end = self.at + length
        if end > len(self.data):
            raise BadModel("the GGUF file is cut short")
        text = self.data[self.at : end].decode("utf-8", "replace")
        self.at = end
        return text

    def value(self, kind: int, depth: int = 0) -> Any:  # noqa: ANN401 - a GGUF value is a number, string, bool or list
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind], 1)[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise BadModel(f"GGUF value type {kind} at byte {self.at} is unknown")
        (item_kind,) = self.scalars("I", 1)
        (count,) = self.scalars("Q", 1)
        if item_kind in _SCALARS:
            return list(self.scalars(_SCALARS[item_kind], count))
        if count > len(self.data):
            raise BadModel("the GGUF file is cut short")
        return [self.value(item_kind, depth + 1) for _ in range(count)]


class GgufTensor(msgspec.Struct, frozen=True):
    """`shape` is row-major, `kind` ggml's number of the type, `offset` counts from the file's first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_metadata(path: Path) -> dict[str, Any]:
    """All key-value pairs of a GGUF file (version 2 or 3, little-endian).

    Raises:
        BadModel: not such a file, or cut short.
    """
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """All key-value pairs and tensor descriptions.

    Raises:
        BadModel: not such a file, or cut short.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise BadModel(f"{path} is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            magic, version = cursor.scalars("I", 2)
            if magic != 0x46554747 or version not in (2, 3):
                raise BadModel(f"{path} is not a GGUF file of version 2 or 3")
            num_tensors, num_pairs = cursor.scalars("Q", 2)
            pairs: dict[str, Any] = {}
            for _ in range(num_pairs):
                key = cursor.string()
                (kind,) = cursor.scalars("I", 1)
                pairs[key] = cursor.value(kind)
            found = [_tensor(cursor) for _ in range(num_tensors)]
            alignment = pairs.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise BadModel(f"{path}: general.alignment is {alignment!r}")
            start = -(-cursor.at // alignment) * alignment
            return pairs, [GgufTensor(t.name, t.shape, t.kind, start + t.offset) for t in found]


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string()
    (num_dims,) = cursor.scalars("I", 1)
    if num_dims > 8:
        raise BadModel(f"GGUF tensor {name!r} has {num_dims} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", num_dims)))
    (kind,) = cursor.scalars("I", 1)
    (offset,) = cursor.scalars("Q", 1)
    return GgufTensor(name, shape, kind, offset)
