"""Carries blocks between the target's device pool and the archive, beside the steps.

The target's own thread copies a block to host memory when the device is idle, or now and then when it never is; a
second thread writes and reads files, so no step waits for a disk.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from shared.messages import ArchivedBlock, BlocksArchived, BlocksLoaded, BlockStore, LoadBlocks
from workers.arrays import start_evaluating
from workers.cache.archive import Archive, ArchivedState, Copy
from workers.cache.blocks import BlockPool, State

MAX_WAITING = 4096  # blocks that wait for their copy; the oldest are given up
# Between two copies while steps run: reading one waits for the step that is queued before it, so each costs the GPU
# about a step (H100, 32 rows: ten copies a second cost a fifth of the throughput).
BUSY_INTERVAL_S = 2.0
MAX_IN_MEMORY = 16  # copies that wait for the disk
ANNOUNCED_AT_ONCE = 2000  # blocks in one message


@dataclass(frozen=True)
class Waiting:
    block_hash: bytes
    block_id: int
    has_window: bool
    state_id: int | None


@dataclass(frozen=True)
class Copying:
    """A block that the device is putting together; what is queued before it comes first."""

    item: Waiting
    content: mx.array
    state: State | None


class Archiver:
    """Args:
    pool: the device tier.
    archive: where copies go.
    """

    def __init__(self, pool: BlockPool, archive: Archive) -> None:
        self._pool = pool
        self._archive = archive
        self._waiting: deque[Waiting] = deque(maxlen=MAX_WAITING)
        self._jobs: queue.Queue[tuple[bytes, Copy] | LoadBlocks | None] = queue.Queue()
        self._written: queue.SimpleQueue[tuple[ArchivedBlock | None, list[bytes]]] = queue.SimpleQueue()
        self._read: queue.SimpleQueue[tuple[LoadBlocks, list[Copy | None]]] = queue.SimpleQueue()
        self._dropped: list[bytes] = []  # from host memory, not told yet
        self._num_writing = 0
        self._num_loading = 0
        self._last_copy = 0.0
        self._copying: Copying | None = None
        self._thread = threading.Thread(target=self._work, name="archive", daemon=True)
        self._thread.start()

    @property
    def is_loading(self) -> bool:
        return self._num_loading > 0

    @property
    def has_work(self) -> bool:
        """Blocks wait for their copy and the disk keeps up."""
        return self._copying is not None or (bool(self._waiting) and self._num_writing < MAX_IN_MEMORY)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(timeout=2.0)

    def reset(self) -> None:
        """The pool was emptied."""
        self._waiting.clear()
        self._copying = None

    def shrink(self) -> None:
        """Memory is short: give back the copies in host memory. Files stay."""
        self._waiting.clear()
        self._dropped += self._archive.drop_copies()

    def clear(self) -> None:
        self.reset()
        self._archive.clear()

    # ------------------------------------------------ device -> archive

    def stored(self, stores: Sequence[BlockStore]) -> None:
        """These blocks are in the pool now."""
        for stored in stores:
            for i, block_hash in enumerate(stored.hashes):
                item = Waiting(block_hash, stored.block_ids[i], stored.has_window[i], stored.states.get(i))
                self._waiting.append(item)

    def copy_some(self, is_idle: bool) -> None:
        """Copy a waiting block; nothing while steps run and the last copy was only just made.

        A copy takes two calls: the first queues it on the device, the second reads it, by when it is done.
        """
        if self._copying is not None:
            item, state = self._copying.item, self._copying.state
            states = None if state is None else _described(state)
            self._num_writing += 1
            self._jobs.put((item.block_hash, Copy(np.array(self._copying.content), states, item.has_window)))
            self._copying = None
            return
        now = time.monotonic()
        if not self.has_work or (not is_idle and now - self._last_copy < BUSY_INTERVAL_S):
            return
        self._last_copy = now
        item = self._waiting.popleft()
        flags = ("w" if item.has_window else "") + ("s" if item.state_id is not None else "")
        if self._pool.holder(item.block_id) != item.block_hash or self._archive.has(item.block_hash, flags):
            return
        state = None if item.state_id is None else self._pool.read_state(item.state_id)
        self._copying = Copying(item, self._pool.read_block(item.block_id, item.has_window), state)
        start_evaluating([self._copying.content])

    # ------------------------------------------------ archive -> device

    def load(self, message: LoadBlocks) -> None:
        """Start reading; `loaded` gives the answer."""
        self._num_loading += 1
        self._jobs.put(message)

    def loaded(self) -> BlocksLoaded | None:
        """The next load whose files were read, now in the pool."""
        try:
            message, copies = self._read.get_nowait()
        except queue.Empty:
            return None
        self._num_loading -= 1
        is_loaded = [copy is not None for copy in copies]
        for i, state_id in message.states.items():
            copy = copies[i]
            if copy is None or copy.states is None:
                is_loaded[i] = False
            else:
                self._pool.write_state(state_id, _state(copy.states, self._pool.num_state_layers))
        for has_window in (False, True):
            chosen = [i for i, c in enumerate(copies) if c is not None and is_loaded[i] and c.has_window is has_window]
            if chosen:
                self._pool.write_blocks(
                    [message.block_ids[i] for i in chosen],
                    [message.hashes[i] for i in chosen],
                    [c.content for i in chosen if (c := copies[i]) is not None],
                    has_window,
                )
        return BlocksLoaded(epoch=message.epoch, load_id=message.load_id, is_loaded=is_loaded)

    # ------------------------------------------------ what the scheduler is told

    def everything(self, epoch: int) -> list[BlocksArchived]:
        """All that the archive holds, for a scheduler that does not know it yet."""
        blocks = [
            ArchivedBlock(block_hash=h, has_window="w" in flags, has_state="s" in flags)
            for h, flags in self._archive.blocks().items()
        ]
        num_blocks, num_bytes = self._archive.sizes()
        parts = [blocks[i : i + ANNOUNCED_AT_ONCE] for i in range(0, max(1, len(blocks)), ANNOUNCED_AT_ONCE)]
        return [BlocksArchived(epoch=epoch, added=part, blocks=num_blocks, tier_bytes=num_bytes) for part in parts]

    def news(self, epoch: int) -> BlocksArchived | None:
        """Blocks written and dropped since the last call."""
        added: list[ArchivedBlock] = []
        removed, self._dropped = self._dropped, []
        while True:
            try:
                block, gone = self._written.get_nowait()
            except queue.Empty:
                break
            self._num_writing -= 1
            if block is not None:
                added.append(block)
            removed += gone
        errors = self._archive.take_errors()
        if not (added or removed or errors):
            return None
        num_blocks, num_bytes = self._archive.sizes()
        return BlocksArchived(
            epoch=epoch, added=added, removed=removed, blocks=num_blocks, tier_bytes=num_bytes, num_errors=errors
        )

    # ------------------------------------------------ the second thread

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, LoadBlocks):
                self._read.put((job, [self._archive.get(h) for h in job.hashes]))
                continue
            block_hash, copy = job
            is_kept, removed = self._archive.put(block_hash, copy)
            block = ArchivedBlock(block_hash=block_hash, has_window=copy.has_window, has_state=copy.states is not None)
            self._written.put((block if is_kept else None, removed))


def _described(state: State) -> tuple[ArchivedState, ...]:
    """A kept state as bytes; a layer's missing array is left out, and stays missing."""
    parts = []
    for i, arrays in enumerate(state):
        for j, array in enumerate(arrays or []):
            if array is not None:
                dtype = str(array.dtype).removeprefix("mlx.core.")
                raw = np.array(array.view(mx.uint8)).tobytes()
                parts.append(ArchivedState(i * MAX_ARRAYS + j, dtype, tuple(array.shape), raw))
    return tuple(parts)


def _state(parts: Sequence[ArchivedState], num_arrays: Sequence[int]) -> State:
    """Args:
    num_arrays: of each recurrent layer.
    """
    state: State = [[None] * n for n in num_arrays]
    for part in parts:
        raw = mx.array(np.frombuffer(part.data, np.uint8))
        arrays = state[part.layer // MAX_ARRAYS]
        assert arrays is not None, "every layer has a list"
        arrays[part.layer % MAX_ARRAYS] = raw.view(getattr(mx, part.dtype)).reshape(part.shape)
    return state


MAX_ARRAYS = 16  # of one recurrent layer
