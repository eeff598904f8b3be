"""Cached blocks by hash: which are in the target's device pool, which in its archive, and who goes first.

Every operation is O(1) per block. The target runs messages in order, so a block may be handed to a new owner while an
earlier step that reads it is still on its way; only blocks that a message to come will read have to be pinned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Sequenced


class Entry:
    """One block. It is resident (`block_id`), archived (host memory or SSD), or both."""

    __slots__ = (
        "archived_state",
        "archived_window",
        "block_hash",
        "block_id",
        "has_window",
        "is_archived",
        "is_awaited",
        "is_unused",
        "num_pins",
        "state_id",
    )

    def __init__(self, block_hash: bytes) -> None:
        self.block_hash = block_hash
        self.block_id: int | None = None
        self.has_window = False  # its rows of sliding-window layers are there too
        self.state_id: int | None = None  # recurrent state after its last token
        self.num_pins = 0
        self.is_awaited = False  # its content comes with a step or load that is not sent or not done yet
        self.is_unused = False  # it was loaded from the archive, and no sequence has started from it since
        self.is_archived = False
        self.archived_window = False
        self.archived_state = False

    @property
    def is_ready(self) -> bool:
        """A slot can be restored from it now."""
        return self.block_id is not None and not self.is_awaited


class PrefixIndex:
    """Args:
    num_blocks: blocks of the device pool.
    num_states: recurrent states that the target keeps.
    """

    def __init__(self, num_blocks: int, num_states: int) -> None:
        self.num_blocks = num_blocks
        self.num_states = num_states
        self.num_evicted = 0
        self._entries: dict[bytes, Entry] = {}
        self._resident: OrderedDict[bytes, Entry] = OrderedDict()  # least recently used first
        self._with_state: OrderedDict[bytes, Entry] = OrderedDict()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._free_states = list(range(num_states - 1, -1, -1))
        self._lent_states: set[int] = set()  # held by running sequences

    def get(self, block_hash: bytes) -> Entry | None:
        return self._entries.get(block_hash)

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    @property
    def num_states_used(self) -> int:
        return self.num_states - len(self._free_states)

    # ------------------------------------------------ lookup

    def chain(self, hashes: Sequenced[bytes], limit: int) -> list[Entry]:
        """The longest chain of known blocks, at most `limit`."""
        found = []
        for block_hash in hashes[:limit]:
            entry = self._entries.get(block_hash)
            if entry is None:
                break
            found.append(entry)
        return found

    def touch(self, hashes: Iterable[bytes]) -> None:
        """Make these the most recently used, the first of them most of all: a chain is worth nothing without its
        head."""
        for block_hash in reversed(list(hashes)):
            if block_hash in self._resident:
                self._resident.move_to_end(block_hash)
            if block_hash in self._with_state:
                self._with_state.move_to_end(block_hash)

    def pin(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.num_pins += 1

    def unpin(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            assert entry.num_pins > 0, "unpin a block that nobody pinned"
            entry.num_pins -= 1
            if entry.num_pins == 0 and entry.block_id is None and not entry.is_archived:
                self._entries.pop(entry.block_hash, None)

    # ------------------------------------------------ blocks

    def insert(self, block_hash: bytes, has_window: bool) -> Entry | None:
        """Give the block a place in the device pool, evicting the least recently used; None if all are pinned."""
        entry = self._entries.get(block_hash)
        assert entry is None or entry.block_id is None, "insert a block that is resident"
        block_id = self._free.pop() if self._free else self._evict()
        if block_id is None:
            return None
        if entry is None:
            entry = self._entries[block_hash] = Entry(block_hash)
        entry.block_id = block_id
        entry.has_window = has_window
        self._resident[block_hash] = entry
        return entry

    def _evict(self) -> int | None:
        victim = next((e for e in self._resident.values() if e.num_pins == 0 and not e.is_awaited), None)
        if victim is None:
            return None
        self.num_evicted += 1
        self.evict(victim)
        return self._free.pop()

    def discard(self, block_hash: bytes) -> None:
        """Take a block out of the device pool and forget its archived copy: its content is not to be trusted."""
        entry = self._entries.get(block_hash)
        if entry is not None:
            entry.is_archived = False
            if entry.block_id is not None:
                self.evict(entry)
            elif entry.num_pins == 0:
                del self._entries[block_hash]

    def evict(self, entry: Entry) -> None:
        """Take a block out of the device pool."""
        assert entry.block_id is not None, "a block that is not resident cannot leave"
        self._free.append(entry.block_id)
        entry.block_id = None
        entry.has_window = entry.is_awaited = False
        del self._resident[entry.block_hash]
        self._drop_state(entry)
        if not entry.is_archived and entry.num_pins == 0:
            del self._entries[entry.block_hash]

    def evict_all(self) -> None:
        """Take every block that nobody reads or writes at the moment out of the device pool; copies of it stay."""
        for entry in list(self._resident.values()):
            if entry.num_pins == 0 and not entry.is_awaited:
                self.evict(entry)
                self.num_evicted += 1

    def resident_ids(self) -> list[int]:
        return [e.block_id for e in self._resident.values() if e.block_id is not None]

    def free_state_ids(self) -> list[int]:
        return list(self._free_states)

    def clear(self) -> int:
        """Forget every block that nobody reads at the moment; how many blocks were resident."""
        before = len(self._resident)
        for entry in list(self._entries.values()):
            if entry.num_pins == 0:
                self.discard(entry.block_hash)
        return before - len(self._resident)

    # ------------------------------------------------ recurrent states

    def lend_state(self) -> int | None:
        """A state id for a running sequence, taken from the least recently used block if none is free."""
        if not self._free_states:
            victim = next((e for e in self._with_state.values() if e.num_pins == 0 and not e.is_awaited), None)
            if victim is None:
                return None
            self._drop_state(victim)
        state_id = self._free_states.pop()
        self._lent_states.add(state_id)
        return state_id

    def return_state(self, state_id: int) -> None:
        self._lent_states.remove(state_id)
        self._free_states.append(state_id)

    def attach_state(self, entry: Entry, state_id: int) -> None:
        """The lent state belongs to a block from now on."""
        assert entry.block_id is not None, "a state goes with a resident block"
        self._lent_states.remove(state_id)
        self._drop_state(entry)
        entry.state_id = state_id
        self._with_state[entry.block_hash] = entry

    def _drop_state(self, entry: Entry) -> None:
        if entry.state_id is not None:
            self._free_states.append(entry.state_id)
            entry.state_id = None
            del self._with_state[entry.block_hash]

    # ------------------------------------------------ archive

    def archived(self, block_hash: bytes, has_window: bool, has_state: bool) -> None:
        """The target holds a copy outside the device pool."""
        entry = self._entries.get(block_hash)
        if entry is None:
            entry = self._entries[block_hash] = Entry(block_hash)
        entry.is_archived, entry.archived_window, entry.archived_state = True, has_window, has_state

    def unarchived(self, block_hash: bytes) -> None:
        """The copy is gone."""
        entry = self._entries.get(block_hash)
        if entry is not None:
            entry.is_archived = False
            if entry.block_id is None and entry.num_pins == 0:
                del self._entries[block_hash]

    # ------------------------------------------------ invariants

    def check_integrity(self) -> None:
        used = [e.block_id for e in self._resident.values() if e.block_id is not None]
        assert sorted([*used, *self._free]) == list(range(self.num_blocks)), "free + used != total, or a block twice"
        assert all(self._entries.get(h) is e for h, e in self._resident.items()), "a resident block is not known"
        resident = {h for h, e in self._entries.items() if e.block_id is not None}
        assert resident == set(self._resident), "a block is resident and not listed"
        states = [e.state_id for e in self._with_state.values() if e.state_id is not None]
        everywhere = [*states, *self._free_states, *self._lent_states]
        assert sorted(everywhere) == list(range(self.num_states)), "a state is lost or twice"
        assert all(e.block_id is not None for e in self._with_state.values()), "a state without its block"
        assert all(e.block_id is not None or e.is_archived or e.num_pins > 0 for e in self._entries.values()), (
            "an entry without content"
        )
