"""The prefix cache with real models in the real core: the same tokens as without it, and blocks that are right."""

from __future__ import annotations

import random
from collections.abc import Callable

import mlx.core as mx
import pytest

from scheduler import session
from shared.messages import BlockStore, Cancel, RequestId
from tests.support.engine_rig import (
    VOCAB,
    WINDOW,
    EngineRig,
    decoder_target,
    make_engine,
    mlx_lm_target,
)
from tests.support.layouts import ALL_LAYOUTS
from workers.cache import blocks
from workers.engine import Engine
from workers.models.base import TextModel

BLOCK = 4
MODELS: dict[str, Callable[[], TextModel]] = {
    "full": decoder_target,
    "sliding": lambda: decoder_target(window=WINDOW),
    "hybrid": lambda: mlx_lm_target("qwen3_next"),
    "short-convolution": lambda: mlx_lm_target("lfm2"),
    "state-space": lambda: mlx_lm_target("mamba2"),
    "latent": lambda: mlx_lm_target("deepseek_v3"),
}
UNPAGED = ("state-space", "short-convolution")  # without keys and values, or a second hybrid: nothing new when paged
CASES = [(kind, layout) for kind in MODELS for layout in ALL_LAYOUTS if layout == "slots" or kind not in UNPAGED]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def engine(request: pytest.FixtureRequest) -> Engine:
    kind, layout = request.param
    return make_engine(MODELS[kind](), num_slots=6, block_size=BLOCK, layout=layout)


@pytest.fixture(scope="module")
def seen(engine: Engine) -> dict[tuple[int, ...], list[int]]:
    """What `plain_tokens` found with this engine: schedules of one seed ask for much the same."""
    return {}


def plain_tokens(
    engine: Engine, prompt: list[int], num_tokens: int, cache: dict[tuple[int, ...], list[int]]
) -> list[int]:
    """A run of its own, on the same engine without its cache."""
    key = (*prompt, -num_tokens)
    if key not in cache:
        blocks, engine.blocks = engine.blocks, None
        try:
            cache[key] = EngineRig(engine).run({"r": prompt}, num_tokens)["r"]
        finally:
            engine.blocks = blocks
    return cache[key]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ngram", [False, True])
def test_random_chats_give_the_tokens_of_single_runs_without_a_cache(
    engine: Engine, seen: dict[tuple[int, ...], list[int]], seed: int, ngram: bool
) -> None:
    rng = random.Random(seed)
    vocab = min(VOCAB, engine.vocab_size)
    k = 3 if ngram else None
    chats = EngineRig(engine, num_blocks=rng.choice((7, 40)), k=k, ngram=ngram, prefix_check_rate=0.5)
    texts = [[rng.randrange(vocab) for _ in range(rng.randrange(8, 40))] for _ in range(2)]
    asked: dict[str, tuple[list[int], int]] = {}
    for i in range(9):
        text = list(rng.choice(texts))
        if rng.random() < 0.3:
            text[rng.randrange(len(text))] = rng.randrange(vocab)
        prompt = [*text, *(rng.randrange(vocab) for _ in range(rng.randrange(1, 6)))][:80]
        asked[f"r{i}"] = (prompt, rng.randrange(2, 12))
        chats.submit(f"r{i}", *asked[f"r{i}"])
        if rng.random() < 0.3:
            chats.submit(f"stranger{i}", prompt[::-1], 6)
        for _ in range(rng.randrange(6)):
            chats.work()
        if rng.random() < 0.3:
            chats.send("front", Cancel(request_id=RequestId(f"stranger{i}")))
        if rng.random() < 0.6:
            texts.append([*prompt, *chats.tokens(f"r{i}")])  # the next turn of this chat, or what is there of it
    chats.drain()
    got = {name: chats.tokens(name) for name in asked}
    counts = chats.core.metrics.prefix
    assert counts.hit_tokens > 0, "nothing was ever restored"
    assert counts.checks["different"] == 0
    assert got == {name: plain_tokens(engine, *case, seen) for name, case in asked.items()}


def test_a_restored_slot_holds_what_a_prefill_computes(engine: Engine) -> None:
    """The keys and values themselves: blocks of a hit agree with the same blocks computed again."""
    rng = random.Random(1)
    prompt = [rng.randrange(min(VOCAB, engine.vocab_size)) for _ in range(37)]
    rig = EngineRig(engine, num_blocks=40)
    rig.run({"a": prompt}, 3)
    assert engine.blocks is not None
    assert rig.session.prefix is not None
    index = rig.session.prefix.index
    entries = list(index._resident.values())
    assert entries
    rig.submit("b", [*prompt, 1, 2, 3], 8)
    rig.work()
    slot = rig.core.running[0].slot
    assert slot is not None
    n = len(rig.core.running[0].restore)
    assert n >= (1 if engine.store.is_recurrent else 8)
    hashes = rig.core.running[0].block_hashes[:n]
    ids = [index.get(h).block_id for h in hashes]  # type: ignore[union-attr] # just restored
    stored = BlockStore(slot=slot, indices=list(range(n)), block_ids=ids, hashes=hashes, has_window=[True] * n)  # type: ignore[arg-type]
    assert not mx.any(engine.blocks.differing(stored, 1e-6))
    if any(layer.spec.window is None for layer in engine.store.kv_layers):
        wrong = BlockStore(
            slot=slot,
            indices=list(range(n)),
            block_ids=[*ids[1:], ids[0]],
            hashes=hashes,
            has_window=[True] * n,  # type: ignore[arg-type]
        )
        assert mx.all(engine.blocks.differing(wrong, 0.02)) or n == 1
    rig.drain()


def test_a_block_that_changed_is_found_by_the_check_and_dropped() -> None:
    engine = make_engine(decoder_target(), num_slots=4, block_size=BLOCK)
    rig = EngineRig(engine, num_blocks=40, prefix_check_rate=1.0)
    prompt = list(range(20))
    wanted = rig.run({"a": prompt}, 4)["a"]
    assert engine.blocks is not None
    pool = engine.blocks._values[3][0]
    pool[2, 1, 3, 5] = 0.9
    engine.blocks._values[3][0] = pool
    rig.run({"b": prompt}, 4)
    counts = rig.core.metrics.prefix
    assert counts.checks["different"] == 1
    assert counts.checks["equal"] > 0
    assert rig.run({"c": prompt}, 4)["c"] == wanted
    assert counts.checks["different"] == 1


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_failed_row_leaves_nothing_in_the_cache(layout: str) -> None:
    engine = make_engine(decoder_target(), num_slots=4, block_size=BLOCK, layout=layout)
    rig = EngineRig(engine, num_blocks=40)
    good = engine.model.head
    engine.model.head = lambda rows: good(rows) * float("nan")  # type: ignore[method-assign]
    prompt = list(range(20))
    rig.submit("bad", prompt, 3)
    rig.drain()
    engine.model.head = good  # type: ignore[method-assign]
    assert rig.outputs["bad"][-1].finish_reason == "error"
    assert rig.session.prefix is not None
    assert rig.session.prefix.index.num_resident == 0


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_a_hit_beyond_the_ring_of_a_sliding_layer_restores_its_window_where_the_ring_has_it(layout: str) -> None:
    engine = make_engine(decoder_target(window=WINDOW), num_slots=4, block_size=BLOCK, layout=layout)
    ring = min(layer.capacities[-1] for layer in engine.store.kv_layers)
    rng = random.Random(4)
    prompt = [rng.randrange(VOCAB) for _ in range(110)]
    assert len(prompt) > ring, "nothing wraps"
    rig = EngineRig(engine, num_blocks=60)
    wanted = rig.run({"cold": prompt}, 8)["cold"]
    assert rig.run({"warm": prompt}, 8)["warm"] == wanted
    timings = rig.outputs["warm"][-1].timings
    assert timings is not None
    assert timings.num_cached_tokens == 108


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_memory_that_is_short_now_and_then_changes_no_token(
    kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools shrink between any two steps, sequences are preempted, and blocks come back into segments given back."""
    monkeypatch.setattr(blocks, "SEGMENT_BLOCKS", 8)
    monkeypatch.setattr(session, "SHRINK_INTERVAL_S", 0.0)
    engine = make_engine(MODELS[kind](), num_slots=6, block_size=BLOCK, layout=layout)
    rng = random.Random(7)
    vocab = min(VOCAB, engine.vocab_size)
    start = [rng.randrange(vocab) for _ in range(24)]
    rig = EngineRig(engine, num_blocks=40, memory_limit_bytes=1000, memory_hard_limit_bytes=1200)
    asked: dict[str, tuple[list[int], int]] = {}
    largest = 0
    for i in range(10):
        asked[f"r{i}"] = ([*start, *(rng.randrange(vocab) for _ in range(rng.randrange(1, 30)))], rng.randrange(2, 12))
        used = rng.choice((1100, 1300))
        rig.tell_memory(0)
        rig.submit(f"r{i}", *asked[f"r{i}"])
        for _ in range(rng.randrange(2, 8)):
            rig.work()
            largest = max(largest, engine.store.nbytes())
        rig.tell_memory(used)
    rig.drain()
    assert rig.core.metrics.preemptions._value.get() > 0
    rig.tell_memory(1100)
    rig.drain()
    assert engine.blocks is not None
    assert not sum(a.nbytes for layer in engine.blocks._keys for a in layer), "segments that hold nothing"
    assert not engine.store.kv_layers or engine.store.nbytes() < largest
    rig.tell_memory(0)
    asked["last"] = asked["r0"]
    rig.submit("last", *asked["r0"])
    rig.drain()
    seen: dict[tuple[int, ...], list[int]] = {}
    assert {name: rig.tokens(name) for name in asked} == {
        name: plain_tokens(engine, *case, seen) for name, case in asked.items()
    }
