"""What a kernel reads and writes: one layer's pools and the block tables of the rows of one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from workers.arrays import start_evaluating

RING = 0  # `shift` of a layout whose rows are one block each, of any size, in which positions wrap


class Pool:
    """Keys and values of one layer, each (num_blocks, num_kv_heads, block_size, dim), row-contiguous.

    The kernels write into these arrays in place, which MLX's graph does not see. What it sees is `last`, the output of
    the newest kernel that wrote or read: the next one takes it as an input, so that kernels on one pool run in the
    order in which they were built. Whoever uses the arrays otherwise calls `settle` first.
    """

    def __init__(self, keys: mx.array, values: mx.array) -> None:
        self.keys, self.values = keys, values
        self.num_kv_heads, self.block_size = keys.shape[1:3]
        self.last: mx.array | None = None

    def settle(self) -> None:
        """Queue every write and reading built so far: whatever is queued after it on the device comes later."""
        if self.last is not None:
            start_evaluating([self.last])
            self.last = None


@dataclass(frozen=True)
class Pages:
    """The rows of one forward, or of a part of it.

    Args:
        table: (B, W) int32, a row's blocks in order. Position p lies in block table[b, (p // block_size) % W] at
            p % block_size.
        starts: (B,) int32, each row's first new position: positions below it are in the pool.
        host_starts: the same numbers.
        shift: log2 of the block size, or RING where W is 1 and a block is a slot.
    """

    table: mx.array
    starts: mx.array
    host_starts: Sequence[int]
    shift: int = RING

    @property
    def num_rows(self) -> int:
        return len(self.host_starts)

    @cached_property
    def longest(self) -> int:
        """The largest start."""
        return max(self.host_starts)

    @cached_property
    def width(self) -> int:
        """W: blocks a row, at most."""
        return self.table.shape[1]


def tiles(pages: Pages, rows: int, count: int) -> Pages:
    """Each row as `count` rows of the same sequence, `rows` positions apart: its tiles, one after the other."""
    starts = (pages.starts[:, None] + rows * mx.arange(count, dtype=mx.int32)).reshape(-1)
    host_starts = tuple(start + rows * t for start in pages.host_starts for t in range(count))
    return Pages(mx.contiguous(mx.repeat(pages.table, count, axis=0)), starts, host_starts, pages.shift)


def slot_pages(rows: Sequence[int], starts: Sequence[int]) -> Pages:
    """Slots as pages: each row's table holds its one block, the pool row."""
    return Pages(
        mx.array(list(rows), dtype=mx.int32)[:, None], mx.array(list(starts), dtype=mx.int32), tuple(starts), RING
    )
