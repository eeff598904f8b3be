"""A name for what a worker computes: equal for two workers only if their tokens would be the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

NUM_SAMPLES = 64
SAMPLE_BYTES = 64 * 1024


def fingerprint(paths: Sequence[Path], config: dict[str, Any], dtype: str) -> str:
    """32 hex digits from the configuration, the type, MLX's version and kind of device, and the weights.

    Of each file: its size, and 64 pieces of 64 KiB spread evenly from the first byte (the header, with all names and
    shapes, begins there) to the last. Reading all of a large model would double the time to start, and training changes
    every tensor.
    """
    digest = hashlib.sha256()
    digest.update(
        json.dumps(
            [config, dtype, importlib.metadata.version("mlx"), str(mx.default_device())], sort_keys=True
        ).encode()
    )
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for i in range(NUM_SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
