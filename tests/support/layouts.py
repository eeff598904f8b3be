"""The cache layouts that one suite of tests runs over: those of the settings, and blocks attended as kernels do it."""

from __future__ import annotations

import mlx.core as mx

from workers.cache.layouts import LAYOUTS, make_store
from workers.cache.spec import AttentionSpec, LayerSpec
from workers.cache.store import CacheStore
from workers.kernels.base import MAX_ROWS, MAX_VERIFY_WIDTH, PagedAttention
from workers.kernels.choice import AttentionChoice, Use
from workers.kernels.reference import ReferenceAttention

PAGES = "paged, by pages"  # the reference stands where a GPU has its kernel
ALL_LAYOUTS = (*LAYOUTS, PAGES)


class EveryShape(AttentionChoice):
    """An implementation that serves every layer whose keys and values are of one size."""

    def use(self, spec: AttentionSpec, q: mx.array, v: mx.array, width: int) -> Use | None:
        if spec.key_dim != spec.value_dim or MAX_ROWS < width <= MAX_VERIFY_WIDTH:
            return None
        return Use(self.attention, width <= MAX_ROWS)

    def shared(self, spec: AttentionSpec, q: mx.array, width: int) -> PagedAttention | None:
        return self.attention if spec.key_dim == spec.value_dim and width <= MAX_ROWS else None

    def tiles(self, spec: AttentionSpec, q: mx.array, v: mx.array, width: int) -> PagedAttention | None:
        return self.attention if spec.key_dim == spec.value_dim and width > MAX_ROWS and width % MAX_ROWS == 0 else None


def store_of(
    layout: str,
    specs: list[LayerSpec],
    capacity_classes: list[int],
    max_width: int,
    is_exact: bool,
    block_size: int,
) -> CacheStore:
    """A store in 32 bits, as `workers.build` would make it on a machine with, or without, a kernel."""
    name = "paged" if layout == PAGES else layout
    store = make_store(name, specs, capacity_classes, max_width, mx.float32, is_exact, block_size=block_size)
    if layout == PAGES:
        store.use_attention(EveryShape(ReferenceAttention()))
    return store
