"""MLX's switches on CUDA, which it reads once: they are set before its first operation there.

MLX keeps a compiled CUDA graph for each pattern of operations and memory, and a cuDNN plan for each pair of lengths
that attention met. Its caches raise an error, for good, once a process has met twice as many as they hold (0.32.4:
400 graphs, 256 plans), and a server that runs for days meets more. Source: mlx/backend/cuda/lru_cache.h, device.cpp
and scaled_dot_product_attention.cpp.

Without graphs each kernel is launched as it comes, and the device begins earlier. With our attention kernel that is
faster nearly everywhere; a cuDNN attention, which models of mlx-lm use, becomes a graph of its own at each call then.
One H100, bfloat16, ms a step, graphs / none:

    rows                                    1             8            32   32 verifying 8
    135M, kernel                   6.3 /  5.7   10.1 /  8.6   11.7 /  7.6    11.8 / 10.4
    1B shape, kernel               3.0 /  2.2    5.1 /  3.8    5.7 /  3.8     5.0 /  6.1
    8B shape, kernel                  - / 6.7      - / 10.1       - / 8.5       - / 14.0
    8B shape, stock attention      8.5 /  9.9   13.2 / 19.7   18.2 / 18.2    27.1 / 29.6
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


def leave_out_graphs() -> None:
    """For a model all of whose layers our attention kernel may serve (workers/own_attention.py); see above.

    With stock attention in some of them graphs are worth more. What the user has set stays.

    Call it before MLX's first operation, so before it is known whether the kernel proves itself on this machine.
    """
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")


def prepare() -> None:
    """Set what the user has not set in the environment."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
