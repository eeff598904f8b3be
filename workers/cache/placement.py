"""Which pool row each slot occupies. Pure bookkeeping: the pools copy what `Move`s say.

A slot lives in one capacity class and owns one row of that class's pools. Classes are ascending capacities; a sequence
that outgrows its class moves up. The rows of one decode batch are kept next to each other, so that a batch is a slice.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True)
class Move:
    """Copy the first `length` positions of one pool row to another, or exchange two rows of one class."""

    from_class: int
    from_row: int
    to_class: int
    to_row: int
    is_swap: bool = False


@dataclass(frozen=True)
class Run:
    """Batch rows first .. first+size-1 are pool rows row .. row+size-1 of one class, in order."""

    capacity_class: int
    row: int
    first: int
    size: int


class Placement:
    def __init__(self, capacity_classes: list[int]) -> None:
        assert capacity_classes == sorted(set(capacity_classes)), "classes must ascend"
        self.capacities = capacity_classes
        self._rows: list[list[int | None]] = [[] for _ in capacity_classes]  # class -> row -> slot
        self._where: dict[int, tuple[int, int]] = {}  # slot -> (class, row)

    def num_rows(self, capacity_class: int) -> int:
        return len(self._rows[capacity_class])

    def where(self, slot: int) -> tuple[int, int]:
        return self._where[slot]

    def __contains__(self, slot: int) -> bool:
        return slot in self._where

    def class_of(self, capacity: int) -> int:
        """The smallest class that holds `capacity` tokens.

        Raises:
            ValueError: even the last class is too small.
        """
        index = bisect_left(self.capacities, capacity)
        if index == len(self.capacities):
            raise ValueError(f"{capacity} tokens exceed the largest slot of {self.capacities[-1]}")
        return index

    def has_room(self, slot: int, capacity: int) -> bool:
        where = self._where.get(slot)
        return where is not None and self.capacities[where[0]] >= capacity

    def ensure(self, slot: int, capacity: int) -> Move | None:
        """Give `slot` a row of at least `capacity`; the Move that carries its content up, if it had a smaller one."""
        wanted = self.class_of(capacity)
        old = self._where.get(slot)
        if old is not None and old[0] >= wanted:
            return None
        rows = self._rows[wanted]
        row = next((i for i, owner in enumerate(rows) if owner is None), len(rows))
        if row == len(rows):
            rows.append(None)
        rows[row] = slot
        self._where[slot] = (wanted, row)
        if old is None:
            return None
        self._rows[old[0]][old[1]] = None
        return Move(old[0], old[1], wanted, row)

    def release(self, slot: int) -> None:
        capacity_class, row = self._where.pop(slot)
        self._rows[capacity_class][row] = None

    def trim(self, capacity_class: int) -> int:
        """Forget the rows behind the last one in use; how many are left."""
        rows = self._rows[capacity_class]
        while rows and rows[-1] is None:
            rows.pop()
        return len(rows)

    def gather(self, slots: list[int]) -> tuple[list[int], list[Run], list[Move]]:
        """Make the rows of `slots` adjacent within each class.

        Returns:
            the slots in batch order, the runs that cover them, and the moves to make first, in order. A single row, or
            rows that are adjacent already, need no move.
        """
        order: list[int] = []
        runs: list[Run] = []
        moves: list[Move] = []
        by_class: dict[int, list[int]] = {}
        for slot in slots:
            by_class.setdefault(self._where[slot][0], []).append(slot)
        for capacity_class in sorted(by_class):
            members = by_class[capacity_class]
            rows = sorted(self._where[s][1] for s in members)
            if rows[-1] - rows[0] != len(rows) - 1:
                moves += self._pack(capacity_class, set(members))
            members.sort(key=lambda s: self._where[s][1])
            runs.append(Run(capacity_class, self._where[members[0]][1], len(order), len(members)))
            order += members
        return order, runs, moves

    def _pack(self, capacity_class: int, members: set[int]) -> list[Move]:
        """Bring `members` to the first rows of their class, touching as few rows as possible."""
        rows = self._rows[capacity_class]
        moves = []
        outside = [self._where[s][1] for s in members if self._where[s][1] >= len(members)]
        for target in range(len(members)):
            occupant = rows[target]
            if occupant in members:
                continue
            source = outside.pop()
            slot = rows[source]
            assert slot is not None, "a member without a row"
            rows[target], rows[source] = slot, occupant
            self._where[slot] = (capacity_class, target)
            if occupant is not None:
                self._where[occupant] = (capacity_class, source)
            moves.append(Move(capacity_class, source, capacity_class, target, is_swap=occupant is not None))
        return moves

    def check_integrity(self) -> None:
        seen = {s: (c, r) for c, rows in enumerate(self._rows) for r, s in enumerate(rows) if s is not None}
        assert seen == self._where, "rows and slots disagree"
