"""The numbers of a launch that are no shapes, as words on the device: one small array for each combination."""

from __future__ import annotations

import struct
from functools import lru_cache

import mlx.core as mx
import numpy as np

from workers.kernels.base import Variant
from workers.kernels.pages import Pages, Pool


def params_of(variant: Variant, pool: Pool, pages: Pages) -> mx.array:
    """`Params` of attention.cuh: scale, soft-cap, window, block size, table width, has sinks, epsilon of the norms."""
    return _params(
        variant.scale,
        variant.softcap or 0.0,
        variant.window or 0,
        pool.block_size,
        pages.width,
        variant.sinks is not None,
        0.0 if variant.norms is None else variant.norms.eps,
    )


@lru_cache(maxsize=256)
def _params(
    scale: float, cap: float, window: int, block_size: int, width: int, has_sinks: bool, eps: float
) -> mx.array:
    words = struct.pack("<2f4if", scale, cap, window, block_size, width, int(has_sinks), eps)
    return mx.array(np.frombuffer(words, dtype=np.int32).copy())


@lru_cache(maxsize=1024)
def number(value: int) -> mx.array:
    """(1,) int32 on the device."""
    return mx.array([value], dtype=mx.int32)
