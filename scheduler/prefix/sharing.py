"""Cached blocks that running sequences refer to in place of copies, where the target's layout allows it.

Such a block is pinned while a sequence with a slot refers to it, and the cache's own share of the memory pays for it:
what the sequence's slot is charged with becomes that much less. N sequences with one prefix are charged for it once.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.prefix.index import Entry, PrefixIndex
from scheduler.sequence import Sequence


class Sharing:
    def __init__(self, index: PrefixIndex, block_size: int) -> None:
        self._index = index
        self._block_size = block_size
        self._held: dict[int, dict[bytes, Entry]] = {}  # by the sequence's identity

    def hold(self, sequence: Sequence, entries: Iterable[Entry]) -> None:
        """The sequence refers to these blocks from now on."""
        held = self._held.setdefault(id(sequence), {})
        new = {entry.block_hash: entry for entry in entries if entry.block_hash not in held}
        self._index.pin(new.values())
        held |= new

    def release(self, sequence: Sequence) -> None:
        """It gives up its slot, or did not get one."""
        self._index.unpin(self._held.pop(id(sequence), {}).values())

    def num_tokens(self, sequence: Sequence) -> int:
        """Positions that its slot is not charged with."""
        return len(self._held.get(id(sequence), ())) * self._block_size

    @property
    def num_sequences(self) -> int:
        return len(self._held)
