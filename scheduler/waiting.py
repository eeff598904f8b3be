"""The waiting queue: fair between tenants; within one by priority, then arrival, with ageing.

A sequence's order is `priority * ageing_s + arrival`: waiting `ageing_s` is worth one priority level, so nobody starves
and the order never has to be computed again. Removal is lazy: a removed entry is skipped when it comes up.

Between tenants the one that was served least goes first, by tokens and weight. One that comes back after a pause starts
level with those that wait: it has saved up nothing. Source: the virtual token counter of Sheng et al. 2024,
arXiv:2401.00588; here output tokens are charged at admission and what was not used is given back at the end.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from scheduler.sequence import Sequence

OUTPUT_COST = 2.0  # of an output token, in prompt tokens


class WaitingQueue:
    """Args:
    weights: tenant -> share; 1 where it is not listed.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._heaps: dict[str, list[tuple[tuple[float, int], Sequence]]] = {}
        self._members: dict[str, set[int]] = {}  # tenants that wait -> ids of their sequences
        self._served: dict[str, float] = {}
        self._floor = 0.0  # what the tenant admitted last had been served

    def __len__(self) -> int:
        return sum(map(len, self._members.values()))

    def __contains__(self, sequence: Sequence) -> bool:
        return id(sequence) in self._members.get(sequence.submit.tenant, ())

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return (s for tenant, ids in self._members.items() for _, s in self._heaps[tenant] if id(s) in ids)

    def push(self, sequence: Sequence) -> None:
        assert sequence not in self, "a sequence waits once"
        tenant = sequence.submit.tenant
        if tenant not in self._members:
            level = min((self._served[t] for t in self._members), default=self._floor)
            self._served[tenant] = max(self._served.get(tenant, 0.0), level)
            self._members[tenant] = set()
        self._members[tenant].add(id(sequence))
        heapq.heappush(self._heaps.setdefault(tenant, []), (sequence.order, sequence))

    def peek(self) -> Sequence | None:
        """The next one to be admitted."""
        if not self._members:
            return None
        if len(self._members) == 1:
            return self._head(next(iter(self._members)))
        return min((self._head(t) for t in self._members), key=lambda s: (self._served[s.submit.tenant], s.order))

    def _head(self, tenant: str) -> Sequence:
        heap, members = self._heaps[tenant], self._members[tenant]
        while id(heap[0][1]) not in members:
            heapq.heappop(heap)
        return heap[0][1]

    def admit(self, sequence: Sequence) -> None:
        """It gets a slot: its tenant is charged for the tokens that it may take."""
        self.remove(sequence)
        if not sequence.charged:
            self._charge(sequence, len(sequence.token_ids) + OUTPUT_COST * sequence.submit.max_tokens)
        self._floor = self._served[sequence.submit.tenant]

    def settle(self, sequence: Sequence) -> None:
        """It has ended: give back what it was charged for and did not take."""
        if sequence.charged:
            self._charge(sequence, sequence.num_prompt_tokens + OUTPUT_COST * sequence.num_output_tokens)

    def _charge(self, sequence: Sequence, cost: float) -> None:
        tenant = sequence.submit.tenant
        self._served[tenant] += (cost - sequence.charged) / self._weights.get(tenant, 1.0)
        sequence.charged = cost

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.submit.tenant
        members, heap = self._members[tenant], self._heaps[tenant]
        members.remove(id(sequence))
        if not members:
            del self._members[tenant], self._heaps[tenant]
        elif len(heap) > 64 and len(heap) > 2 * len(members):
            self._heaps[tenant] = [entry for entry in heap if id(entry[1]) in members]
            heapq.heapify(self._heaps[tenant])

    def is_over_share(self, tenant: str, max_queue: int) -> bool:
        """Whether this tenant holds its part of a full queue. Others may still queue, so that one cannot shut them
        out."""
        num_tenants = len(self._members.keys() | {tenant})
        return len(self._members.get(tenant, ())) >= max(1, max_queue // num_tenants)
