"""Block tables under random schedules: nothing leaks, nobody writes what another reads, contents stay."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.cache.block_tables import NULL_BLOCK, BlockTables, Change

SIZE, WIDTH = 4, 6
SLOTS, NAMES = 4, 6

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, SLOTS - 1), st.integers(1, 7)),
        st.tuples(st.just("roll back"), st.integers(0, SLOTS - 1), st.integers(1, 7)),
        st.tuples(st.just("release"), st.integers(0, SLOTS - 1), st.booleans()),
        st.tuples(st.just("keep"), st.integers(0, SLOTS - 1), st.integers(0, NAMES - 1)),
        st.tuples(st.just("restore"), st.integers(0, SLOTS - 1), st.integers(1, 4)),
        st.tuples(st.just("forget"), st.integers(0, NAMES - 1), st.just(0)),
        st.tuples(st.just("load"), st.integers(0, NAMES - 1), st.just(0)),
        st.tuples(st.just("trim"), st.just(0), st.just(0)),
    ),
    max_size=60,
)


class World:
    """Tables with a pool of plain lists, and beside them what each slot and name should read."""

    def __init__(self) -> None:
        self.tables = BlockTables(WIDTH, SIZE, is_ring=False)
        self.pool: list[list[object]] = [[0] * SIZE]
        self.texts: dict[int, list[object]] = {slot: [] for slot in range(SLOTS)}
        self.named: dict[int, list[object]] = {}
        self.next = 0

    def grow(self) -> None:
        self.pool += [[0] * SIZE for _ in range(self.tables.num_blocks - len(self.pool))]

    def write(self, slot: int, count: int) -> None:
        start = len(self.texts[slot])
        end = min(start + count, WIDTH * SIZE)
        change = Change()
        self.tables.prepare(slot, start, end, change)
        self.grow()
        for block in change.zeros:
            self.pool[block] = [0] * SIZE
        sources = [list(self.pool[a]) for a, _ in change.copies]  # all are read first, as an array operation does
        for (_, target), source in zip(change.copies, sources, strict=True):
            self.pool[target] = source
        table = self.tables.table(slot)
        for p in range(start, end):
            self.next += 1
            self.pool[table[p // SIZE]][p % SIZE] = self.next
            self.texts[slot].append(self.next)

    def release(self, slot: int, *, is_distrusted: bool) -> None:
        if is_distrusted:
            self.tables.distrust(slot)
        self.tables.release(slot)
        self.texts[slot] = []

    def restore(self, slot: int, count: int) -> None:
        names = sorted(self.named)[:count]
        self.release(slot, is_distrusted=False)
        for index, name in enumerate(names):
            self.tables.share(slot, index, name)
            self.texts[slot] += self.named[name]

    def load(self, name: int) -> None:
        block = self.tables.name_new(name)
        self.grow()
        self.next += 1
        self.pool[block] = [self.next] * SIZE
        self.named[name] = list(self.pool[block])

    def do(self, verb: str, a: int, b: int) -> None:
        match verb:
            case "write":
                self.write(a, b)
            case "roll back":
                del self.texts[a][max(0, len(self.texts[a]) - b) :]
            case "release":
                self.release(a, is_distrusted=bool(b))
            case "keep" if len(self.texts[a]) >= SIZE:
                index = b % (len(self.texts[a]) // SIZE)
                self.tables.keep(a, [index], [b])
                self.named[b] = self.texts[a][index * SIZE : (index + 1) * SIZE]
            case "restore":
                self.restore(a, b)
            case "forget":
                self.tables.forget(a)
                self.named.pop(a, None)
            case "load":
                self.load(a)
            case "trim":
                del self.pool[self.tables.trim() :]

    def check(self) -> None:
        self.tables.check_integrity()
        assert self.pool[NULL_BLOCK] == [0] * SIZE
        for slot, text in self.texts.items():
            table = self.tables.table(slot)
            assert [self.pool[table[p // SIZE]][p % SIZE] for p in range(len(text))] == text
        for name, content in self.named.items():
            assert self.pool[self.tables.named(name)] == content


@settings(max_examples=200, deadline=None)
@given(operations=OPERATIONS)
def test_contents_stay_and_no_block_is_lost_under_random_operations(operations: list[tuple[str, int, int]]) -> None:
    world = World()
    for verb, a, b in operations:
        world.do(verb, a, b)
        world.check()
    for slot in range(SLOTS):
        world.tables.release(slot)
    for name in world.tables.names():
        world.tables.forget(name)
    world.tables.check_integrity()
    assert world.tables.num_used == 0
    assert world.tables.trim() == 1


def test_a_prefix_is_shared_and_only_a_partly_filled_block_is_copied() -> None:
    world = World()
    world.write(0, 2 * SIZE)
    world.tables.keep(0, [0, 1], [0, 1])
    for slot in (1, 2):
        world.tables.share(slot, 0, 0)
        world.tables.share(slot, 1, 1)
    assert world.tables.num_used == 2
    at_border, within = Change(), Change()
    world.tables.prepare(1, 2 * SIZE, 2 * SIZE + 1, at_border)
    assert at_border == Change()
    world.tables.prepare(2, SIZE + 1, SIZE + 2, within)
    ((source, target),) = within.copies
    assert source == world.tables.named(1)
    assert target == world.tables.table(2)[1] != source
    world.tables.check_integrity()


def test_a_ring_keeps_older_positions_of_a_shared_block_that_it_writes_from_its_start() -> None:
    tables, change = BlockTables(2, SIZE, is_ring=True), Change()
    tables.prepare(0, 0, 2 * SIZE, change)
    tables.keep(0, [0], [0])
    tables.prepare(0, 2 * SIZE, 2 * SIZE + 1, change)
    assert change.copies == [(tables.named(0), tables.table(0)[0])]
    tables.check_integrity()


def test_a_block_that_may_hold_nan_is_zeroed_before_its_next_owner_has_it() -> None:
    tables, change = BlockTables(2, SIZE, is_ring=False), Change()
    tables.prepare(0, 0, SIZE, change)
    block = int(tables.table(0)[0])
    tables.distrust(0)
    tables.release(0)
    assert not change.zeros
    tables.prepare(1, 0, 1, change)
    assert change.zeros == [block]


def test_a_name_of_nothing_is_an_error() -> None:
    tables = BlockTables(2, SIZE, is_ring=False)
    with pytest.raises(AssertionError, match="never wrote"):
        tables.keep(0, [0], [5])
