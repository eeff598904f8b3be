"""The cache layouts, by the name that `kv_layout` gives them."""

from __future__ import annotations

import mlx.core as mx

from workers.cache.blocks import BlockPool
from workers.cache.paged import PagedStore
from workers.cache.paged_blocks import PagedBlockPool
from workers.cache.spec import LayerSpec
from workers.cache.store import CacheStore

LAYOUTS = ("slots", "paged")


def make_store(
    layout: str,
    specs: list[LayerSpec],
    capacity_classes: list[int],
    max_width: int,
    dtype: mx.Dtype,
    is_exact: bool,
    slack: int = 32,
    block_size: int = 32,
) -> CacheStore:
    """Args: as of `CacheStore`; `block_size` is the paged layout's."""
    if layout == "paged":
        return PagedStore(specs, capacity_classes, max_width, dtype, is_exact, slack, block_size)
    return CacheStore(specs, capacity_classes, max_width, dtype, is_exact, slack)


def make_block_pool(store: CacheStore, block_size: int) -> BlockPool:
    """The prefix cache's device tier for a store."""
    if isinstance(store, PagedStore):
        assert store.block_size == block_size, "the prefix cache's blocks are the store's"
        return PagedBlockPool(store)
    return BlockPool(store, block_size)
