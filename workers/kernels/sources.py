"""How a CUDA kernel's text names the files it is written in."""

from __future__ import annotations

from pathlib import Path


def include(name: str) -> str:
    """By paths: MLX copies and hashes a kernel's text on each launch, 16 KB take it 5 us."""
    return "".join(f'#include "{Path(__file__).with_name(file)}"\n' for file in ("numbers.cuh", name))
