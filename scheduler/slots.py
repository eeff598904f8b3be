"""Slots and the one KV budget: who holds how many tokens of capacity. free + used = total, always.

A slot is charged with its capacity, less the positions that lie in shared blocks (scheduler/prefix/sharing.py).
"""

from __future__ import annotations

from bisect import bisect_left


class SlotPool:
    """Args:
    num_slots: sequences that may run at once.
    capacity_tokens: sum of the capacities that may be held.
    capacity_classes: ascending sizes a slot can have.
    """

    def __init__(self, num_slots: int, capacity_tokens: int, capacity_classes: list[int]) -> None:
        self.num_slots = num_slots
        self.capacity_tokens = capacity_tokens
        self.capacity_classes = capacity_classes
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: dict[int, int] = {}
        self._shared: dict[int, int] = {}  # positions of a slot that the prefix cache is charged with
        self.used_tokens = 0

    @property
    def num_free_slots(self) -> int:
        return len(self._free)

    def class_for(self, num_tokens: int) -> int | None:
        """The smallest capacity that holds `num_tokens`; None if no slot can."""
        index = bisect_left(self.capacity_classes, num_tokens)
        return self.capacity_classes[index] if index < len(self.capacity_classes) else None

    def can_hold(self, capacity: int, instead_of: int = 0) -> bool:
        return self.used_tokens - instead_of + capacity <= self.capacity_tokens

    def allocate(self, capacity: int, shared: int = 0) -> int:
        assert self.can_hold(capacity - shared), "allocate beyond the budget"
        slot = self._free.pop()
        self._held[slot] = capacity
        self.used_tokens += capacity
        self.share(slot, shared)
        return slot

    def share(self, slot: int, num_tokens: int) -> None:
        """So many of the slot's positions lie in shared blocks now."""
        before = self._shared.get(slot, 0)
        if num_tokens != before:
            assert before < num_tokens <= self._held[slot], "shared blocks become more, and lie within the slot"
            self.used_tokens -= num_tokens - before
            self._shared[slot] = num_tokens

    def num_shared(self, slot: int) -> int:
        return self._shared.get(slot, 0)

    def grow(self, slot: int, capacity: int) -> None:
        assert self.can_hold(capacity, instead_of=self._held[slot]), "grow beyond the budget"
        self.used_tokens += capacity - self._held[slot]
        self._held[slot] = capacity

    def free(self, slot: int) -> None:
        self.used_tokens -= self._held.pop(slot) - self._shared.pop(slot, 0)
        self._free.append(slot)

    def check_integrity(self) -> None:
        assert len(set(self._free)) == len(self._free), "a slot is free twice"
        assert len(self._free) + len(self._held) == self.num_slots, "free + used != total"
        assert not set(self._free) & set(self._held), "a slot is free and used"
        charged = sum(self._held.values()) - sum(self._shared.values())
        assert self.used_tokens == charged, "the sum of what is held is wrong"
        assert self._shared.keys() <= self._held.keys(), "a free slot shares blocks"
        assert self.used_tokens <= self.capacity_tokens, "more held than there is"
