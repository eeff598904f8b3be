"""Rows of slots: nobody shares one, batches are adjacent, and content follows its slot through every move."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from workers.cache.placement import Move, Placement

CAPACITIES = [8, 32, 64]
EVENT = st.one_of(
    st.tuples(st.just("ensure"), st.integers(0, 7), st.integers(1, 64)),
    st.tuples(st.just("release"), st.integers(0, 7)),
    st.tuples(st.just("gather"), st.sets(st.integers(0, 7), min_size=1), st.randoms(use_true_random=False)),
)


@given(events=st.lists(EVENT, max_size=60))
@settings(max_examples=300, deadline=None)
def test_content_follows_its_slot_and_batches_are_slices(events: list[tuple[object, ...]]) -> None:
    placement = Placement(CAPACITIES)
    pools: dict[tuple[int, int], int] = {}  # what is in each row: the slot that wrote it

    def carry(move: Move) -> None:
        source, target = (move.from_class, move.from_row), (move.to_class, move.to_row)
        if move.is_swap:
            pools[source], pools[target] = pools[target], pools[source]
        else:
            pools[target] = pools[source]

    held: dict[int, int] = {}
    for event in events:
        match event:
            case ("ensure", int() as slot, int() as capacity):
                move = placement.ensure(slot, capacity)
                if move is not None:
                    carry(move)
                pools.setdefault(placement.where(slot), slot)
                if slot not in held:
                    pools[placement.where(slot)] = slot
                held[slot] = max(held.get(slot, 0), capacity)
            case ("release", int() as slot) if slot in held:
                placement.release(slot)
                del held[slot]
            case ("gather", set() as chosen, shuffler) if chosen & held.keys():
                slots = sorted(chosen & held.keys())
                shuffler.shuffle(slots)  # type: ignore[attr-defined] # a Random
                order, runs, moves = placement.gather(slots)
                for move in moves:
                    carry(move)
                assert sorted(order) == sorted(slots)
                assert sum(run.size for run in runs) == len(order)
                assert len({run.capacity_class for run in runs}) == len(runs), "a class in two runs"
                for run in runs:
                    for i in range(run.size):
                        assert placement.where(order[run.first + i]) == (run.capacity_class, run.row + i)
                assert not placement.gather(order)[2], "adjacent rows are moved again"
        placement.check_integrity()
        for slot, capacity in held.items():
            assert pools[placement.where(slot)] == slot, "a slot's content is gone"
            assert CAPACITIES[placement.where(slot)[0]] >= capacity
