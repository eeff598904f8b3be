"""The waiting queue: by priority, then arrival, with ageing.

A sequence's order is `priority * ageing_s + arrival`: waiting `ageing_s` is worth one priority level, so nobody starves
and the order never has to be computed again. Removal is lazy: a removed entry is skipped when it comes up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from scheduler.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, int], Sequence]] = []
        self._members: set[int] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return id(sequence) in self._members

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (s for _, s in self._heap if id(s) in self._members)

    def push(self, sequence: Sequence) -> None:
        assert sequence not in self, "a sequence waits once"
        self._members.add(id(sequence))
        heapq.heappush(self._heap, (sequence.order, sequence))

    def peek(self) -> Sequence | None:
        while self._heap and id(self._heap[0][1]) not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        sequence = self.peek()
        assert sequence is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._members.remove(id(sequence))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        self._members.remove(id(sequence))
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._members):
            self._heap = [entry for entry in self._heap if id(entry[1]) in self._members]
            heapq.heapify(self._heap)
