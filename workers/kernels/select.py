"""At start: asks the machine's kernel to prove itself for the model's layers, and says what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import mlx.core as mx

from shared.errors import BadConfig
from workers.cache.spec import AttentionSpec
from workers.kernels.base import MAX_ROWS, PagedAttention
from workers.kernels.choice import AttentionChoice, ShapeClass
from workers.kernels.cuda import CudaAttention, supports
from workers.kernels.metal import MetalAttention
from workers.kernels.prove import choose

logger = logging.getLogger("target")

VERIFY_ROWS = (2, 4, 8, 16)  # widths that the engine pads verify rows to


def select(
    layers: Sequence[tuple[AttentionSpec, int]], dtype: mx.Dtype, setting: str, *, is_speculative: bool
) -> AttentionChoice | None:
    """The kernels that serve, None where stock operations do everything.

    Args:
        layers: each attention layer and its number of query heads.
        setting: "auto", "stock" or "kernel".
        is_speculative: verify rows will come.
    Raises:
        BadConfig: "kernel" was asked for, and there is none or it gives other values.
    """
    if setting == "stock":
        return None
    attention = machine_kernel()
    if attention is None:
        return _none(setting, "no attention kernel for this machine")
    shapes = shape_classes(layers, dtype, is_speculative=is_speculative, has_chunks=isinstance(attention, CudaAttention))
    if not shapes:
        return _none(setting, "no attention kernel for this model's layers")
    started = time.perf_counter()
    choice = choose(attention, shapes, is_forced=setting == "kernel")
    for reason in choice.reasons:
        logger.info("attention: %s", reason)
    logger.info("attention kernels checked in %.1f s", time.perf_counter() - started)
    if setting == "kernel" and not all(choice.is_used.values()):
        raise BadConfig(f"TANDEM_ATTENTION=kernel: {'; '.join(choice.reasons)}")
    return choice if any(choice.is_used.values()) else AttentionChoice(attention, {}, choice.reasons)


def machine_kernel() -> PagedAttention | None:
    if mx.default_device().type == mx.DeviceType.cpu:
        return None
    if mx.metal.is_available():
        return MetalAttention()
    return CudaAttention() if mx.cuda.is_available() else None


def shape_classes(
    layers: Sequence[tuple[AttentionSpec, int]], dtype: mx.Dtype, *, is_speculative: bool, has_chunks: bool
) -> list[ShapeClass]:
    """What the layers need, as far as a kernel was written for it; decode first."""
    rows = [1, *([0] if has_chunks else []), *(r for r in VERIFY_ROWS if is_speculative and r <= MAX_ROWS)]
    kinds = dict.fromkeys((num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim) for spec, num_heads in layers)
    return [
        ShapeClass(num_heads, num_kv_heads, dim, r, dtype)
        for r in rows
        for num_heads, num_kv_heads, dim, value_dim in kinds
        if dim == value_dim and supports(num_heads, num_kv_heads, dim, dtype.size, max(r, 1))
    ]


def _none(setting: str, reason: str) -> None:
    if setting == "kernel":
        raise BadConfig(f"TANDEM_ATTENTION=kernel: {reason}")
