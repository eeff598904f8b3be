"""Prefill rows that share a forward. On a GPU a short one costs mostly launches, and sixteen cost hardly more."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator

from shared.messages import StepRow

MAX_GROUP_TOKENS = 2048  # padded tokens of one forward


def prefill_groups(
    rows: Iterable[StepRow], kind: Callable[[StepRow], Hashable | None], width: Callable[[StepRow], int]
) -> Iterator[list[StepRow]]:
    """Args:
        kind: rows of one kind may share a forward; None: this one may not.
        width: padded tokens of a row, the same for all rows of a kind.
    Returns:
        groups of 1, 2, 4, 8 ... rows: each number of rows is a shape that has to be planned anew.
    """
    by_kind: dict[Hashable, list[StepRow]] = {}
    for row in rows:
        key = kind(row)
        if key is None:
            yield [row]
        else:
            by_kind.setdefault(key, []).append(row)
    for members in by_kind.values():
        largest = max(1, MAX_GROUP_TOKENS // width(members[0]))
        while members:
            size = 1 << (min(len(members), largest).bit_length() - 1)
            yield members[:size]
            members = members[size:]
