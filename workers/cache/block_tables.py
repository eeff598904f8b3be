"""Which blocks of a pool each slot holds, by reference count. Pure bookkeeping: the store copies what `Change` says.

Position p of a slot lies in block table[(p // block_size) % width] at p % block_size: a table as wide as the longest
sequence never wraps, a sliding layer's is a ring. Block 0 is nobody's and stays zero: places without a block read it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NULL_BLOCK = 0

Table = np.ndarray[Any, np.dtype[np.int32]]


@dataclass
class Change:
    """What to do to the pool before rows are written: blocks to zero first, then (from, to) copies."""

    zeros: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class BlockTables:
    """Args:
    width: most blocks of a slot.
    is_ring: positions wrap, so that a block that is written from its start may still hold older ones in use.
    """

    def __init__(self, width: int, block_size: int, *, is_ring: bool) -> None:
        self.width = width
        self.block_size = block_size
        self._is_ring = is_ring
        self._tables: dict[int, Table] = {}  # slot -> its blocks (width,), the null block where it has none
        self._names: dict[int, int] = {}  # the scheduler's block id -> block
        self._refs = [1]
        self._free: list[int] = []
        self._dirty: set[int] = set()  # may hold NaN: to be zeroed before somebody else has them

    @property
    def num_blocks(self) -> int:
        """Blocks that the pool must have."""
        return len(self._refs)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return len(self._refs) - 1 - len(self._free)

    def table(self, slot: int) -> Table:
        """A slot's blocks (width,), filled up with the null block. To be read before the tables change."""
        found = self._tables.get(slot)
        if found is None:
            found = self._tables[slot] = np.full((self.width,), NULL_BLOCK, np.int32)
        return found

    # ------------------------------------------------ slots

    def prepare(self, slot: int, start: int, end: int, change: Change) -> None:
        """Let a slot write positions start .. end-1: each block there becomes its own. Adds to `change`."""
        table = self.table(slot)
        for index in range(start // self.block_size, -(-end // self.block_size)):
            old = int(table[index % self.width])
            if old != NULL_BLOCK and self._refs[old] == 1:
                continue
            new = self._take(change)
            if old != NULL_BLOCK:
                if self._is_ring or start > index * self.block_size:
                    change.copies.append((old, new))
                self._drop(old)
            table[index % self.width] = new

    def share(self, slot: int, index: int, block_id: int) -> None:
        """Block `index` of a slot is what the name stands for."""
        table, at = self.table(slot), index % self.width
        block, old = self._names[block_id], int(table[at])
        self._refs[block] += 1
        if old != NULL_BLOCK:
            self._drop(old)
        table[at] = block

    def release(self, slot: int) -> None:
        for block in self._held(slot):
            self._drop(block)
        self._tables.pop(slot, None)

    def distrust(self, slot: int) -> None:
        """A slot's blocks may hold NaN, and a masked NaN would reach their next owner's output, as 0 * NaN."""
        self._dirty.update(self._held(slot))

    def _held(self, slot: int) -> list[int]:
        table = self._tables.get(slot)
        held: list[int] = [] if table is None else table[table != NULL_BLOCK].tolist()
        return held

    # ------------------------------------------------ names

    def keep(self, slot: int, indices: Sequence[int], block_ids: Sequence[int]) -> None:
        """Name blocks of a slot; a name that stood for another block lets that go."""
        for index, block_id in zip(indices, block_ids, strict=True):
            block = int(self.table(slot)[index % self.width])
            assert block != NULL_BLOCK, f"slot {slot} never wrote block {index}"
            self._refs[block] += 1
            self.forget(block_id)
            self._names[block_id] = block

    def name_new(self, block_id: int) -> int:
        """A block for content from elsewhere, all of which is going to be written."""
        self.forget(block_id)
        self._names[block_id] = block = self._take(Change())
        return block

    def named(self, block_id: int) -> int:
        return self._names[block_id]

    def names(self) -> list[int]:
        return list(self._names)

    def forget(self, block_id: int) -> None:
        block = self._names.pop(block_id, None)
        if block is not None:
            self._drop(block)

    # ------------------------------------------------ blocks

    def trim(self) -> int:
        """Forget the free blocks behind the last one in use; how many are left."""
        while self._refs[-1] == 0:
            self._refs.pop()
        self._free = [block for block in self._free if block < len(self._refs)]
        self._dirty = {block for block in self._dirty if block < len(self._refs)}
        return len(self._refs)

    def _take(self, change: Change) -> int:
        if self._free:
            block = self._free.pop()
            self._refs[block] = 1
        else:
            block = len(self._refs)
            self._refs.append(1)
        if block in self._dirty:
            self._dirty.discard(block)
            change.zeros.append(block)
        return block

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free.append(block)

    def check_integrity(self) -> None:
        """Free + used = all, and a block's count is the number of its holders."""
        held = Counter(block for slot in self._tables for block in self._held(slot))
        held.update(self._names.values())
        assert self._refs[NULL_BLOCK] == 1, "the null block was given away"
        assert NULL_BLOCK not in self._free, "the null block is free"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        for block in range(1, len(self._refs)):
            assert self._refs[block] == held[block], f"block {block}: {self._refs[block]} counted, {held[block]} held"
            assert (block in self._free) == (held[block] == 0), f"block {block} is free and held, or neither"
