"""The device tier of the prefix cache in the paged layout: names of blocks that lie in the one pool.

Nothing is copied: keeping a block and restoring it are references. The scheduler's block ids are the names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from shared.messages import BlockStore
from workers.arrays import start_evaluating
from workers.cache.block_tables import Change
from workers.cache.blocks import BlockPool
from workers.cache.paged import PagedStore


class PagedBlockPool(BlockPool):
    """Args:
    store: the slots' caches, whose block size is the pool's.
    """

    def __init__(self, store: PagedStore) -> None:
        super().__init__(store, store.block_size)
        self._paged = store

    def reset(self) -> None:
        super().reset()
        for tables in self._paged.tables.values():
            for block_id in tables.names():
                tables.forget(block_id)

    def shrink(self, kept_blocks: Collection[int], free_states: Iterable[int]) -> None:
        super().shrink(kept_blocks, free_states)
        kept = set(kept_blocks)
        for tables in self._paged.tables.values():
            for block_id in set(tables.names()) - kept:
                tables.forget(block_id)

    def keep(self, stored: BlockStore) -> None:
        self._holders.update(zip(stored.block_ids, stored.hashes, strict=True))
        for window, tables in self._paged.tables.items():
            chosen = [j for j in range(len(stored.indices)) if window is None or stored.has_window[j]]
            tables.keep(stored.slot, [stored.indices[j] for j in chosen], [stored.block_ids[j] for j in chosen])
            for j in set(range(len(stored.indices))) - set(chosen):
                tables.forget(stored.block_ids[j])  # the name stood for another block, which had its window

    def _share(self, slot: int, block_ids: Sequence[int]) -> None:
        """Give a slot the blocks of a prefix; of a sliding layer those of the window."""
        num_tokens = len(block_ids) * self.block_size
        self._paged.set_length(slot, num_tokens)
        for window, tables in self._paged.tables.items():
            first = 0 if window is None else max(0, num_tokens - window) // self.block_size
            for index in range(first, len(block_ids)):
                tables.share(slot, index, block_ids[index])

    def restore(self, slot: int, block_ids: Sequence[int], state_id: int | None) -> None:
        self._share(slot, block_ids)
        if state_id is not None:
            for recurrent, arrays in zip(self._paged.recurrent_layers, self._states[state_id], strict=True):
                recurrent.restore(slot, None if arrays is None else (arrays, 0))

    def read_block(self, block_id: int, has_window: bool) -> mx.array:
        parts = []
        for layer in self._paged.kv_layers:
            if layer.spec.window is None or has_window:
                layer.settle(0)
                block = self._paged.tables[layer.spec.window].named(block_id)
                parts += [
                    p[0][block].reshape(-1).view(mx.uint8) for p in (layer.keys, layer.values) if p[0] is not None
                ]
        return mx.concatenate(parts) if parts else mx.zeros((0,), mx.uint8)

    def write_blocks(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[bytes],
        contents: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
        has_window: bool,
    ) -> None:
        self._holders.update(zip(block_ids, hashes, strict=True))
        if not self._paged.kv_layers or not contents[0].nbytes:
            return
        targets: dict[int | None, mx.array] = {}
        for window, tables in self._paged.tables.items():
            if window is None or has_window:
                targets[window] = mx.array([tables.name_new(block_id) for block_id in block_ids])
                self._paged.change(window, Change())
            else:
                for block_id in block_ids:
                    tables.forget(block_id)
        data, at = mx.array(np.stack(contents)), 0
        for layer in self._paged.kv_layers:
            if layer.spec.window not in targets:
                continue
            layer.settle(0)
            for pools, dim in ((layer.keys, layer.spec.key_dim), (layer.values, layer.spec.value_dim)):
                shape = (layer.spec.num_kv_heads, self.block_size, dim)
                size = shape[0] * shape[1] * shape[2] * layer.dtype.size
                pool = pools[0]
                assert pool is not None, "a pool that was never reserved"
                pool[targets[layer.spec.window]] = data[:, at : at + size].view(layer.dtype).reshape(-1, *shape)
                pools[0] = pool
                at += size
        start_evaluating(self._paged.pending())

    def differing(self, stored: BlockStore, tolerance: float) -> mx.array:
        result = mx.zeros((len(stored.indices),), mx.bool_)
        for layer in self._paged.kv_layers:
            if layer.spec.window is not None:
                continue  # the scratch slot's ring keeps the last positions only
            tables = self._paged.tables[None]
            layer.settle(0)
            own = mx.array(tables.table(stored.slot)[stored.indices])
            named = mx.array([tables.named(block_id) for block_id in stored.block_ids])
            for pools in (layer.keys, layer.values):
                pool = pools[0]
                assert pool is not None, "a pool that was never reserved"
                fresh, held = pool[own].astype(mx.float32), pool[named].astype(mx.float32)
                scale = mx.abs(fresh).max(axis=(1, 2, 3)) + 1e-6
                result = result | (mx.abs(fresh - held).max(axis=(1, 2, 3)) > tolerance * scale)
        return result
