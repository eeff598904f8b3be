"""MLX's switches on CUDA, which it reads once: they are set before `mlx.core` is imported.

MLX keeps a compiled CUDA graph for each pattern of operations and memory, and a cuDNN plan for each pair of lengths
that attention met. Its caches raise an error, for good, once a process has met twice as many as they hold (0.32.4:
400 graphs, 256 plans), and a server that runs for days meets more. Source: mlx/backend/cuda/lru_cache.h, device.cpp
and scaled_dot_product_attention.cpp.
"""

from __future__ import annotations

import os
from types import MappingProxyType

DEFAULTS = MappingProxyType(
    {
        "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
        "MLX_CUDA_GRAPH_CACHE_SIZE": "4000",
        "MLX_CUDA_SDPA_CACHE_SIZE": "1024",
    }
)


def prepare() -> None:
    """Set what the user has not set in the environment."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
