"""What only the paged layout promises: a prefix is held once, hits copy nothing, and no block is lost."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest

from shared.errors import BadConfig
from tests.support.engine_rig import VOCAB, WINDOW, EngineRig, decoder_target, make_engine
from tests.support.layouts import PAGES, EveryShape, store_of
from workers.cache import paged
from workers.cache.paged import PagedStore
from workers.cache.spec import AttentionSpec
from workers.engine import Engine
from workers.kernels import prove as proving
from workers.kernels import select as selecting
from workers.kernels.base import Variant
from workers.kernels.choice import AttentionChoice
from workers.kernels.pages import RING, Pages, Pool
from workers.kernels.reference import ReferenceAttention
from workers.kernels.select import select

pytestmark = pytest.mark.mlx

BLOCK, PREFIX, OWN = 4, 96, 3


def num_used(engine: Engine, window: int | None = None) -> int:
    assert isinstance(engine.store, PagedStore)
    engine.store.tables[window].check_integrity()
    return engine.store.tables[window].num_used


def most_used(num_agents: int) -> tuple[int, int]:
    """The most blocks held while agents with one prefix run together, and how many ran."""
    engine = make_engine(decoder_target(), num_slots=8, block_size=BLOCK, layout="paged")
    rig = EngineRig(engine, num_blocks=200)
    rng = random.Random(2)
    prefix = [rng.randrange(VOCAB) for _ in range(PREFIX)]
    for i in range(num_agents):
        rig.submit(f"agent{i}", [*prefix, *(rng.randrange(VOCAB) for _ in range(OWN))], 6)
    used = together = 0
    while not all(
        rig.outputs.get(f"agent{i}") and rig.outputs[f"agent{i}"][-1].finish_reason for i in range(num_agents)
    ):
        rig.work()
        used, together = max(used, num_used(engine)), max(together, len(rig.core.running))
    return used, together


def test_agents_with_one_prefix_hold_it_once() -> None:
    alone, _ = most_used(1)
    used, together = most_used(8)
    assert together == 8, "they never ran together"
    assert alone >= PREFIX // BLOCK
    own_blocks = -(-(OWN + 6) // BLOCK) + 32 // BLOCK  # its own tokens, and what a step's padding may reach
    assert used <= alone + 7 * own_blocks
    assert used < 8 * alone / 2, "the prefix is held more than once"


@pytest.mark.parametrize("window", [None, WINDOW])
def test_nothing_is_held_after_everybody_left_and_the_cache_was_emptied(window: int | None) -> None:
    engine = make_engine(decoder_target(window=window), num_slots=4, block_size=BLOCK, layout="paged")
    rig = EngineRig(engine, num_blocks=20)
    rng = random.Random(3)
    for i in range(8):
        rig.submit(f"r{i}", [rng.randrange(VOCAB) for _ in range(rng.randrange(4, 60))], 8)
    rig.drain()
    assert isinstance(engine.store, PagedStore)
    held = {w: num_used(engine, w) for w in engine.store.tables}
    assert 0 < held[None] <= 20
    engine.reset()
    engine.shrink([], [])
    for w in engine.store.tables:
        assert num_used(engine, w) == 0
    assert all(
        a.shape[0] == 1 for layer in engine.store.kv_layers for a in (*layer.keys, *layer.values) if a is not None
    )


class Recorder(ReferenceAttention):
    """Keeps the pages of each call, so that their ids stay apart."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Pages]] = []  # query rows, pages

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        self.calls.append((q.shape[2], pages))
        return super().attend(q, k, v, pool, pages, variant)


@pytest.mark.parametrize("width", [1, 4])
def test_a_step_gathers_nothing_and_makes_one_table_for_each_window(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gather(pool: mx.array, table: mx.array) -> mx.array:
        raise AssertionError("a decode or verify step gathered its context")

    monkeypatch.setattr(paged, "gather", no_gather)
    full, sliding = AttentionSpec(2, 8, 8), AttentionSpec(2, 8, 8, WINDOW)
    recorder = Recorder()
    store = store_of(PAGES, [full, sliding, full, sliding], [256], 32, is_exact=False, block_size=BLOCK)
    store.use_attention(EveryShape(recorder))
    for slot in (0, 1):
        store.ensure(slot, 256)
    widths = set()
    for start in range(0, 60, width):
        batch = store.open([0, 1], [start, start], width)
        for view in batch.layers:
            q, k, v = (mx.random.normal((2, heads, width, 8)) for heads in (4, 2, 2))
            view.attend(q, k, v, 0.3)  # type: ignore[union-attr] # a KVView
        made = recorder.calls[-4:]
        assert [rows for rows, _ in made] == [width] * 4
        assert made[0][1] is made[2][1], "a table for each layer"
        assert made[1][1] is made[3][1], "a table for each layer"
        assert made[0][1].table.dtype == mx.int32
        assert made[0][1].shift == 2
        ring = made[1][1].table.shape[1]
        assert ring * BLOCK == store.kv_layers[1].capacities[0], "a ring's table is whole"
        widths.add(made[0][1].table.shape[1])
    assert widths == {64 // BLOCK}, "a table as wide as each length has as many shapes"


def test_a_block_size_that_no_kernel_takes_is_not_taken_for_another() -> None:
    store = store_of(PAGES, [AttentionSpec(2, 8, 8)], [64], 32, is_exact=False, block_size=6)
    store.ensure(0, 64)
    view = store.open([0], [0], 1).layers[0]
    q, k, v = (mx.random.normal((1, heads, 1, 8)) for heads in (4, 2, 2))
    with pytest.raises(AssertionError, match="2\\^n positions, not 6"):
        view.attend(q, k, v, 0.3)  # type: ignore[union-attr] # a KVView


class OffInBlocks(ReferenceAttention):
    """Right over slots, where a table is one block."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return super().attend(q, k, v, pool, pages, variant) + (0.0 if pages.shift == RING else 1.0)


def test_a_kernel_serves_blocks_only_if_it_is_right_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [(AttentionSpec(2, 64, 64), 4)]

    def chosen(setting: str, is_paged: bool) -> AttentionChoice | None:
        return select(
            layers, mx.float32, setting, is_speculative=False, cache_folder=tmp_path, widths=[1], is_paged=is_paged
        )

    monkeypatch.setattr(selecting, "machine_kernel", ReferenceAttention)
    forced = chosen("kernel", is_paged=True)
    assert forced is not None
    assert all(forced.is_used.values())
    monkeypatch.setattr(selecting, "machine_kernel", OffInBlocks)
    assert chosen("kernel", is_paged=False) is not None
    with pytest.raises(BadConfig, match="off by"):
        chosen("kernel", is_paged=True)
    found = chosen("auto", is_paged=True)
    assert found is not None
    assert not any(found.is_used.values())


def test_what_was_found_over_slots_is_not_taken_for_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selecting, "machine_kernel", OffInBlocks)
    monkeypatch.setattr(proving, "seconds", lambda attention, shape, **_: 1e-6 if attention is not None else 2e-6)
    layers, found = [(AttentionSpec(2, 64, 64), 4)], {}
    for is_paged in (False, True):
        found[is_paged] = select(
            layers, mx.float32, "auto", is_speculative=False, cache_folder=tmp_path, widths=[1], is_paged=is_paged
        )
    assert [all(choice.is_used.values()) for choice in found.values() if choice] == [True, False]


def test_a_pool_grows_in_advance_only_as_far_as_the_memory_goes() -> None:
    store = store_of("paged", [AttentionSpec(2, 8, 8)], [4096], 32, is_exact=True, block_size=4)
    assert isinstance(store, PagedStore)
    store.limit_growth(1000)
    sizes = set()
    for start in range(0, 992, 32):
        store.ensure(0, 1000)
        store.open([0], [start], 32)
        keys = store.kv_layers[0].keys[0]
        assert keys is not None
        sizes.add(keys.shape[0])
    assert max(sizes) == 251, "1,000 positions in blocks of 4, and the block that is nobody's"
    assert len(sizes) < 6, "in few steps"
    store.open([0], [992], 32)
    keys = store.kv_layers[0].keys[0]
    assert keys is not None
    assert keys.shape[0] == 257, "what is written has room in any case"


def test_a_step_that_a_kernel_wrote_in_holds_no_pool() -> None:
    """Else the next stock write, of blocks that come from SSD, would copy all of it."""
    store = store_of(PAGES, [AttentionSpec(2, 8, 8)], [64], 32, is_exact=False, block_size=4)
    store.ensure(0, 64)
    view = store.open([0], [0], 1).layers[0]
    keys = store.kv_layers[0].keys[0]
    assert keys is not None
    assert [a.shape for a in store.pending()] == [keys.shape] * 2, "nothing was written by a kernel yet"
    q, k, v = (mx.random.normal((1, heads, 1, 8)) for heads in (4, 2, 2))
    out = view.attend(q, k, v, 0.3)  # type: ignore[union-attr] # a KVView
    pool = store.kv_layers[0].pool(0)
    pool.last = out  # as a kernel leaves it, which writes in place
    assert store.pending() == [out]
    store.kv_layers[0].settle(0)
    assert [a.shape for a in store.pending()] == [keys.shape] * 2
