"""The device tier of the prefix cache: a pool of blocks for each attention layer, and kept recurrent states.

A block is `block_size` positions of one sequence: keys and values (num_kv_heads, block_size, dim) in every layer. The
scheduler says which block goes where; slots are given blocks by copy, so a block never changes while it is somebody's.
A sliding layer restores only its window.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from shared.messages import BlockStore
from workers.arrays import start_evaluating
from workers.cache.kv import KVLayer
from workers.cache.store import CacheStore

SEGMENT_BLOCKS = 64  # the pool grows by so many blocks: nothing is reserved for a cache that stays small

State = list[list[mx.array | None] | None]
"""For each recurrent layer its arrays, one row each; None where the slot had none yet."""

Index = slice | mx.array
"""Of some among many: neighbours as a slice, which a GPU copies in one plain launch."""

Place = tuple[int, Index, Index | None]
"""(segment, indices within it, which of the blocks given they are; None: all)"""


class BlockPool:
    """Args:
    store: the slots' caches.
    block_size: positions of a block.
    """

    def __init__(self, store: CacheStore, block_size: int) -> None:
        self.block_size = block_size
        self._store = store
        self._keys: list[list[mx.array]] = []  # layer -> segments (SEGMENT_BLOCKS, H, n, D)
        self._values: list[list[mx.array]] = []
        self._states: dict[int, State] = {}
        self._holders: dict[int, bytes] = {}  # block id -> hash of what lies there

    def reset(self) -> None:
        """Forget every block and state; the pool's memory stays."""
        self._states.clear()
        self._holders.clear()

    def shrink(self, kept_blocks: Collection[int], free_states: Iterable[int]) -> None:
        """Give back the memory of states that nobody has, and of segments without a block that is kept."""
        for state_id in free_states:
            self._states.pop(state_id, None)
        kept = set(kept_blocks)
        self._holders = {block_id: h for block_id, h in self._holders.items() if block_id in kept}
        used = {block_id // SEGMENT_BLOCKS for block_id in kept}
        for segments in (*self._keys, *self._values):
            for i, segment in enumerate(segments):
                if i not in used and segment.shape[0]:
                    segments[i] = mx.zeros((0, *segment.shape[1:]), segment.dtype)

    def _layers(self) -> list[tuple[KVLayer, list[mx.array], list[mx.array]]]:
        """(layer, its segments of keys, of values). A layer for features may have come since the last call."""
        while len(self._keys) < len(self._store.kv_layers):
            self._keys.append([])
            self._values.append([])
        return list(zip(self._store.kv_layers, self._keys, self._values, strict=True))

    # ------------------------------------------------ slot -> pool

    def keep(self, stored: BlockStore) -> None:
        """Copy blocks of a slot into the pool."""
        self._holders.update(zip(stored.block_ids, stored.hashes, strict=True))
        everything = list(range(len(stored.indices)))
        windowed = [j for j in everything if stored.has_window[j]]  # a sliding layer has rows of these only
        places = _places(stored.block_ids)
        windowed_places = places if windowed == everything else _places([stored.block_ids[j] for j in windowed])
        for layer, keys, values in self._layers():
            chosen = everything if layer.spec.window is None else windowed
            if not chosen:
                continue
            indices = [stored.indices[j] for j in chosen]
            for pools, segments in ((layer.keys, keys), (layer.values, values)):
                rows = self._slot_blocks(layer, pools, stored.slot, indices)
                self._write(segments, places if chosen is everything else windowed_places, rows)

    def _slot_blocks(self, layer: KVLayer, pools: list[mx.array | None], slot: int, indices: Sequence[int]) -> mx.array:
        """Blocks (n, H, block_size, D) out of a slot's row."""
        capacity_class, row = self._store.placement.where(slot)
        pool, capacity, size = pools[capacity_class], layer.capacities[capacity_class], self.block_size
        assert pool is not None, "a slot without a pool"
        first, end = indices[0] * size, (indices[-1] + 1) * size
        if end <= capacity and indices[-1] - indices[0] == len(indices) - 1:
            rows = pool[row, :, first:end]
        else:
            positions = np.concatenate([np.arange(i * size, (i + 1) * size) for i in indices])
            rows = pool[row][:, mx.array(positions % capacity)]
        heads, _, dim = rows.shape
        return rows.reshape(heads, len(indices), size, dim).swapaxes(0, 1)

    def _write(self, segments: list[mx.array], places: Sequence[Place], rows: mx.array) -> None:
        """Put blocks (n, H, block_size, D) at their places."""
        for segment, within, chosen in places:
            while len(segments) <= segment:
                segments.append(mx.zeros((0, *rows.shape[1:]), rows.dtype))
            if not segments[segment].shape[0]:
                segments[segment] = mx.zeros((SEGMENT_BLOCKS, *rows.shape[1:]), rows.dtype)
            target = segments[segment]
            target[within] = rows if chosen is None else rows[chosen]
            segments[segment] = target

    def keep_state(self, slot: int, state_id: int) -> None:
        """Copy a slot's recurrent states, as they are after the rows queued so far."""
        kept: State = []
        for layer in self._store.recurrent_layers:
            held = layer.snapshot(slot)
            kept.append(None if held is None else [_row(a, held[1]) for a in held[0]])
        self._states[state_id] = kept
        start_evaluating(_arrays(kept))  # else the batch's arrays, of all its rows, live as long as this copy is lazy

    # ------------------------------------------------ pool -> slot

    def restore(self, slot: int, block_ids: Sequence[int], state_id: int | None) -> None:
        """Fill positions 0 .. len(block_ids)*block_size-1 of a slot that has room for them."""
        num_tokens = len(block_ids) * self.block_size
        self._store.set_length(slot, num_tokens)
        runs: dict[int, list[tuple[int, Index]]] = {}
        for layer, keys, values in self._layers():
            first = 0 if layer.spec.window is None else max(0, num_tokens - layer.spec.window) // self.block_size
            if first not in runs:
                runs[first] = _runs(block_ids[first:])
            for pools, segments in ((layer.keys, keys), (layer.values, values)):
                self._fill(layer, pools, slot, first, _read(segments, runs[first]))
        if state_id is not None:
            for recurrent, arrays in zip(self._store.recurrent_layers, self._states[state_id], strict=True):
                recurrent.restore(slot, None if arrays is None else (arrays, 0))
        # Before anything writes to the pool again: then that write happens in place.
        start_evaluating(self._store.pending())

    def _fill(self, layer: KVLayer, pools: list[mx.array | None], slot: int, first: int, blocks: mx.array) -> None:
        """Write blocks (n, H, block_size, D) at block index `first` of a slot."""
        capacity_class, row = self._store.placement.where(slot)
        layer.settle(capacity_class)
        pool, capacity = pools[capacity_class], layer.capacities[capacity_class]
        assert pool is not None, "a slot without a pool"
        n, heads, size, dim = blocks.shape
        rows = blocks.swapaxes(0, 1).reshape(heads, n * size, dim)
        start, end = first * size, (first + n) * size
        if end <= capacity:
            pool[row, :, start:end] = rows
        else:
            pool[row, :, mx.arange(start, end) % capacity] = rows
        pools[capacity_class] = pool

    # ------------------------------------------------ archive and self-check

    @property
    def layout(self) -> str:
        """What a block's bytes mean, in words: two pools with the same understand each other's copies."""
        layers = "; ".join(f"{layer.spec} {layer.dtype}" for layer in self._store.kv_layers)
        return f"{self.block_size} positions of {layers}"

    @property
    def num_state_layers(self) -> list[int]:
        """Arrays of each recurrent layer."""
        return [layer.spec.num_arrays for layer in self._store.recurrent_layers]

    def holder(self, block_id: int) -> bytes | None:
        """The hash of the block that lies at this place."""
        return self._holders.get(block_id)

    def read_block(self, block_id: int, has_window: bool) -> mx.array:
        """One block's keys and values as bytes, layer by layer; sliding layers only with `has_window`. Lazy."""
        parts = []
        for layer, keys, values in self._layers():
            if layer.spec.window is None or has_window:
                for segments in (keys, values):
                    block = segments[block_id // SEGMENT_BLOCKS][block_id % SEGMENT_BLOCKS]
                    parts.append(block.reshape(-1).view(mx.uint8))
        if not parts:
            return mx.zeros((0,), mx.uint8)
        return mx.concatenate(parts)

    def write_blocks(
        self,
        block_ids: Sequence[int],
        hashes: Sequence[bytes],
        contents: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
        has_window: bool,
    ) -> None:
        """Put what `read_block` gave back: contents[i] at block_ids[i]."""
        self._holders.update(zip(block_ids, hashes, strict=True))
        if not self._store.kv_layers or not contents[0].nbytes:
            return
        data, places = mx.array(np.stack(contents)), _places(block_ids)
        at = 0
        for layer, keys, values in self._layers():
            if layer.spec.window is None or has_window:
                for segments, dim in ((keys, layer.spec.key_dim), (values, layer.spec.value_dim)):
                    shape = (layer.spec.num_kv_heads, self.block_size, dim)
                    size = shape[0] * shape[1] * shape[2] * layer.dtype.size
                    self._write(segments, places, data[:, at : at + size].view(layer.dtype).reshape(-1, *shape))
                    at += size
        start_evaluating(self.pending())

    def read_state(self, state_id: int) -> State:
        return self._states[state_id]

    def write_state(self, state_id: int, state: State) -> None:
        self._states[state_id] = state

    def differing(self, stored: BlockStore, tolerance: float) -> mx.array:
        """Boolean (n,): which blocks of a slot differ from those in the pool by more than `tolerance` of their scale.

        Two forwards of different shapes round differently, so equality to the bit is not asked for.
        """
        result, runs = mx.zeros((len(stored.indices),), mx.bool_), _runs(stored.block_ids)
        for layer, keys, values in self._layers():
            if layer.spec.window is not None:
                continue  # the scratch slot's ring keeps the last positions only
            for pools, segments in ((layer.keys, keys), (layer.values, values)):
                fresh = self._slot_blocks(layer, pools, stored.slot, stored.indices).astype(mx.float32)
                held = _read(segments, runs).astype(mx.float32)
                scale = mx.abs(fresh).max(axis=(1, 2, 3)) + 1e-6
                result = result | (mx.abs(fresh - held).max(axis=(1, 2, 3)) > tolerance * scale)
        return result

    # ------------------------------------------------ for the engine

    def pending(self) -> list[mx.array]:
        """Everything that may be unevaluated."""
        return [a for pools in (*self._keys, *self._values) for a in pools]

    def nbytes(self) -> int:
        states = [a for state in self._states.values() for a in _arrays(state)]
        return sum(a.nbytes for a in (*self.pending(), *states))


def _places(block_ids: Sequence[int]) -> list[Place]:
    """Where blocks lie, by segment; made once for all layers."""
    places: list[Place] = []
    for segment in sorted({b // SEGMENT_BLOCKS for b in block_ids}):
        here = [i for i, b in enumerate(block_ids) if b // SEGMENT_BLOCKS == segment]
        within = _index([block_ids[i] % SEGMENT_BLOCKS for i in here])
        places.append((segment, within, None if len(here) == len(block_ids) else _index(here)))
    return places


def _index(numbers: Sequence[int]) -> Index:
    if all(b == a + 1 for a, b in pairwise(numbers)):
        return slice(numbers[0], numbers[-1] + 1)
    return mx.array(list(numbers))


def _runs(block_ids: Sequence[int]) -> list[tuple[int, Index]]:
    """(segment, places in it) for each run of neighbours in one segment, in order; made once for all layers."""
    runs: list[tuple[int, list[int]]] = []
    for block_id in block_ids:
        segment = block_id // SEGMENT_BLOCKS
        if not runs or runs[-1][0] != segment:
            runs.append((segment, []))
        runs[-1][1].append(block_id % SEGMENT_BLOCKS)
    return [(segment, _index(within)) for segment, within in runs]


def _read(segments: list[mx.array], runs: Sequence[tuple[int, Index]]) -> mx.array:
    """Blocks (n, H, block_size, D), in the order of the runs."""
    parts = [segments[segment][within] for segment, within in runs]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _row(array: mx.array | None, row: int) -> mx.array | None:
    return None if array is None else mx.contiguous(array[row : row + 1])


def _arrays(state: State) -> list[mx.array]:
    return [a for layer in state if layer is not None for a in layer if a is not None]
