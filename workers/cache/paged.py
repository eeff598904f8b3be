"""The paged layout: one pool of blocks a layer, and sequences that hold block tables.

A second implementation of what `store.py` and `kv.py` offer. Layers with the same window share one table a slot.
Kernels are handed the tables. Stock operations gather a row's blocks and go on as the slots layout does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from workers.cache.batch_shape import BatchShape, bucket_length
from workers.cache.block_tables import BlockTables, Change, Table
from workers.cache.kv import KVLayer, KVView
from workers.cache.placement import Run
from workers.cache.spec import AttentionSpec, LayerSpec
from workers.cache.store import CacheStore
from workers.kernels.base import MAX_ROWS
from workers.kernels.pages import Pages, tiles

GROW_BLOCKS = 64


class PagedLayer(KVLayer):
    """One layer's blocks (num_blocks, num_kv_heads, block_size, dim), as the only class's pool."""

    def __init__(
        self, spec: AttentionSpec, capacity: int, max_width: int, slack: int, dtype: mx.Dtype, block_size: int
    ) -> None:
        super().__init__(spec, [capacity], max_width, slack, dtype)
        self.block_size = block_size
        self.most_blocks: int | None = None  # that the memory is meant for: no growing in advance beyond them
        self.capacities = [-(-self.capacities[0] // block_size) * block_size]

    def reserve(self, capacity_class: int, num_rows: int) -> None:
        """Have at least `num_rows` blocks."""
        for pools, dim in ((self.keys, self.spec.key_dim), (self.values, self.spec.value_dim)):
            pool = pools[capacity_class]
            have = 0 if pool is None else pool.shape[0]
            if num_rows <= have:
                continue
            self.settle(capacity_class)
            blocks = max(have + GROW_BLOCKS, have + have // 2)
            blocks = max(num_rows, blocks if self.most_blocks is None else min(blocks, self.most_blocks))
            fresh = mx.zeros((blocks, self.spec.num_kv_heads, self.block_size, dim), self.dtype)
            if pool is not None:
                fresh[:have] = pool
            pools[capacity_class] = fresh

    def apply(self, change: Change) -> None:
        self.settle(0)
        for pools in (self.keys, self.values):
            pool = pools[0]
            assert pool is not None, "a pool that was never reserved"
            if change.zeros:
                pool[mx.array(change.zeros)] = mx.zeros((), pool.dtype)
            if change.copies:
                sources, targets = (mx.array(ids) for ids in zip(*change.copies, strict=True))
                pool[targets] = pool[sources]
            pools[0] = pool


@dataclass
class PagedShape(BatchShape):
    """Args:
    blocks: by window, the rows' block tables (B, width).
    block_size: positions of a block.
    """

    blocks: dict[int | None, Table] = field(default_factory=dict)
    block_size: int = 1
    table_arrays: dict[tuple[int | None, int], mx.array] = field(default_factory=dict)
    places: dict[int | None, tuple[mx.array, mx.array]] = field(default_factory=dict)
    paged: dict[int | None, Pages] = field(default_factory=dict)
    paged_tiles: dict[int | None, Pages] = field(default_factory=dict)

    def block_pages(self, window: int | None) -> Pages:
        """The rows' block tables as kernels take them, made once for all layers of a window.

        As wide as the longest row needs, in few widths; a ring's is short and always whole.
        """
        if window not in self.paged:
            size = self.block_size
            assert size > 1 and size & (size - 1) == 0, f"kernels take blocks of 2^n positions, not {size}"
            table = self.blocks[window]
            if window is None:
                table = table[:, : -(-bucket_length(max(self.starts) + self.width) // size)]
            starts = mx.array(self.starts, dtype=mx.int32)
            table = np.ascontiguousarray(table)  # MLX keeps NumPy's strides, and kernels read by the pointer
            self.paged[window] = Pages(mx.array(table), starts, tuple(self.starts), size.bit_length() - 1)
        return self.paged[window]

    def block_tiles(self, window: int | None) -> Pages:
        """The same, cut into tiles of MAX_ROWS tokens."""
        if window not in self.paged_tiles:
            self.paged_tiles[window] = tiles(self.block_pages(window), MAX_ROWS, self.width // MAX_ROWS)
        return self.paged_tiles[window]

    def table(self, window: int | None, num_blocks: int) -> mx.array:
        """(B, num_blocks): the rows' first blocks, made once for all layers of a window."""
        key = (window, num_blocks)
        if key not in self.table_arrays:
            self.table_arrays[key] = mx.array(self.blocks[window][:, :num_blocks])
        return self.table_arrays[key]

    def place(self, window: int | None) -> tuple[mx.array, mx.array]:
        """Where the step's positions lie: blocks and places in them, each (B, 1, width)."""
        if window not in self.places:
            size, table = self.block_size, self.blocks[window]
            positions = np.array(self.starts)[:, None] + np.arange(self.width)
            blocks = np.take_along_axis(table, positions // size % table.shape[1], axis=1)
            within = (positions % size).astype(np.int32)
            self.places[window] = (mx.array(blocks)[:, None], mx.array(within)[:, None])
        return self.places[window]


class PagedView(KVView):
    """Kernels get the block tables; for stock operations what is attended is gathered, in a slot's order."""

    def __init__(self, layer: PagedLayer, shape: PagedShape) -> None:
        super().__init__(layer, shape)
        self._paged_layer, self._paged_shape = layer, shape

    def _pages(self, run: Run) -> Pages:
        return self._paged_shape.block_pages(self._paged_layer.spec.window)

    def _tiles(self, run: Run) -> Pages:
        return self._paged_shape.block_tiles(self._paged_layer.spec.window)

    def _write(self, run: Run, k: mx.array, v: mx.array) -> None:
        self._paged_layer.settle(run.capacity_class)
        layer, (blocks, within) = self._paged_layer, self._paged_shape.place(self._paged_layer.spec.window)
        heads = mx.arange(layer.spec.num_kv_heads)[None, :, None]
        for pools, new in ((layer.keys, k), (layer.values, v)):
            pool = pools[0]
            assert pool is not None, "write to a pool that was never reserved"
            pool[blocks, heads, within] = new
            pools[0] = pool

    def _pools(self, run: Run) -> tuple[mx.array, mx.array]:
        layer, shape = self._paged_layer, self._paged_shape
        num_blocks = -(-shape.key_length(run, layer.capacities[0]) // shape.block_size)
        table = shape.table(layer.spec.window, num_blocks)
        keys, values = super()._pools(run)
        return gather(keys, table), gather(values, table)


def gather(pool: mx.array, table: mx.array) -> mx.array:
    """Blocks of a table (B, n) side by side: (B, num_kv_heads, n * block_size, dim)."""
    blocks = pool[table].swapaxes(1, 2)
    return blocks.reshape(*blocks.shape[:2], -1, blocks.shape[-1])


class PagedStore(CacheStore):
    """Args: as of `CacheStore`.
    block_size: positions of a block.
    """

    def __init__(
        self,
        specs: list[LayerSpec],
        capacity_classes: list[int],
        max_width: int,
        dtype: mx.Dtype,
        is_exact: bool,
        slack: int = 32,
        block_size: int = 32,
    ) -> None:
        self.block_size = block_size
        self.tables: dict[int | None, BlockTables] = {}  # by window
        self._most_blocks: int | None = None
        super().__init__(specs, capacity_classes, max_width, dtype, is_exact, slack)

    shares_blocks = True

    @property
    def packs_rows(self) -> bool:
        """`PackedView` reads pools of slots; no view packs rows over block tables."""
        return False

    def _attention_layer(self, spec: AttentionSpec, dtype: mx.Dtype) -> PagedLayer:
        layer = PagedLayer(spec, self.placement.capacities[-1], self.max_width, self._slack, dtype, self.block_size)
        if spec.window not in self.tables:
            width = layer.capacities[0] // self.block_size
            self.tables[spec.window] = BlockTables(width, self.block_size, is_ring=spec.window is not None)
        layer.most_blocks = self._most_blocks
        layer.reserve(0, self.tables[spec.window].num_blocks)
        return layer

    def limit_growth(self, num_tokens: int) -> None:
        """The memory is meant for so many positions of all sequences and cached prefixes together."""
        self._most_blocks = -(-num_tokens // self.block_size) + 1  # and the block that is nobody's
        for layer in self.kv_layers:
            assert isinstance(layer, PagedLayer), "a layer of another layout"
            layer.most_blocks = self._most_blocks

    def _view(self, layer: KVLayer, shape: BatchShape) -> KVView:
        assert isinstance(layer, PagedLayer), "a layer of another layout"
        assert isinstance(shape, PagedShape), "a forward of another layout"
        return PagedView(layer, shape)

    def layers_of(self, window: int | None) -> list[PagedLayer]:
        return [a for a in self.kv_layers if isinstance(a, PagedLayer) and a.spec.window == window]

    def change(self, window: int | None, change: Change) -> None:
        """Make the pools as large as the tables say, and do what they ask."""
        for layer in self.layers_of(window):
            layer.reserve(0, self.tables[window].num_blocks)
            if change.zeros or change.copies:
                layer.apply(change)

    def _arrange(self, slots: Sequence[int], starts: Sequence[int], width: int) -> tuple[list[int], BatchShape]:
        for window, tables in self.tables.items():
            change = Change()
            for slot, start in zip(slots, starts, strict=True):
                tables.prepare(slot, start, start + width, change)
            self.change(window, change)
        shape = PagedShape([Run(0, 0, 0, len(slots))], list(starts), width, self.is_exact)
        shape.block_size = self.block_size
        shape.blocks = {w: np.stack([t.table(slot) for slot in slots]) for w, t in self.tables.items()}
        return list(range(len(slots))), shape

    def ensure(self, slot: int, capacity: int) -> None:
        """Only the scheduler's classes are kept: a slot's blocks come as it writes."""
        self.placement.ensure(slot, capacity)

    def release(self, slot: int) -> None:
        super().release(slot)
        for tables in self.tables.values():
            tables.release(slot)

    def trim(self) -> None:
        for capacity_class in range(len(self.placement.capacities)):
            self.placement.trim(capacity_class)
        for window, tables in self.tables.items():
            num_blocks = tables.trim()
            for layer in self.layers_of(window):
                layer.trim(0, num_blocks)

    def clear(self, slot: int) -> None:
        for tables in self.tables.values():
            tables.distrust(slot)

    def read_features(self, slot: int, length: int) -> mx.array | None:
        layer = self.feature_layer
        if layer is None:
            return None
        layer.settle(0)
        blocks = mx.array(self.tables[None].table(slot)[None, : -(-length // self.block_size)])
        pools = [gather(pool, blocks) for pools in (layer.keys, layer.values) for pool in pools if pool is not None]
        return mx.concatenate([pool[0, 0, :length] for pool in pools], axis=-1)
