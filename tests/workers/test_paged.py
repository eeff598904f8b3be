"""What only the paged layout promises: a prefix is held once, hits copy nothing, and no block is lost."""

from __future__ import annotations

import random

import pytest

from shared.config import Settings
from shared.errors import BadConfig
from tests.support.engine_rig import VOCAB, WINDOW, EngineRig, decoder_target, make_engine
from workers import build
from workers.cache.paged import PagedStore
from workers.engine import Engine
from workers.load.loader import LoadedModel

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


def test_a_kernel_with_the_paged_layout_is_refused() -> None:
    engine = make_engine(decoder_target(), layout="paged")
    loaded: LoadedModel = None  # type: ignore[assignment] # the settings are refused before it is looked at
    with pytest.raises(BadConfig, match="no attention kernel"):
        build.select_attention(loaded, engine, None, Settings(kv_layout="paged", attention="kernel"))  # type: ignore[arg-type]
