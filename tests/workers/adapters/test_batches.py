"""Requests with different adapters in one batch, through the real core and engine: each one's tokens are those it has
alone, and those of a model into which its adapter was merged.
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import itertools
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import pytest

from shared.messages import Output, SamplingParams
from tests.support.engine_rig import (
    GREEDY,
    WINDOW,
    EngineRig,
    ForcedDrafts,
    decoder_target,
    make_engine,
    make_prompts,
    mlx_lm_target,
)
from tests.support.layouts import PAGES
from tests.support.tiny_adapter import write_mlx, write_peft
from workers.adapters import install
from workers.adapters.checkpoint import read
from workers.adapters.install import sizes
from workers.models.base import TextModel

pytestmark = pytest.mark.mlx

BLOCK = 4
NUM_TOKENS = 20
PROMPTS = make_prompts(12)
SEEDED = SamplingParams(temperature=0.9, seed=11, is_seeded=True)
NAMES = ("", "attention", "everything")
MODELS = {
    "full": decoder_target,
    "sliding": lambda: decoder_target(window=WINDOW),
    "hybrid": lambda: mlx_lm_target("qwen3_next"),
    "latent": lambda: mlx_lm_target("deepseek_v3", first_k_dense_replace=9),  # its experts could not be adapted
}
ATTENTION = {
    "full": ("q_proj", "v_proj"),
    "sliding": ("q_proj", "v_proj"),
    "hybrid": ("q_proj", "v_proj", "in_proj_qkvz"),
    "latent": ("q_a_proj", "o_proj"),
}
WHOLE = {name: (*ATTENTION[name], "gate_proj", "down_proj", "k_proj", "out_proj") for name in MODELS}
CASES = [("full", "slots"), ("full", PAGES), ("sliding", "slots"), ("hybrid", "slots"), ("latent", "paged")]


def modules(target: TextModel) -> nn.Module:
    return target if isinstance(target, nn.Module) else target.model  # type: ignore[attr-defined]


def projections(target: TextModel, ends: tuple[str, ...]) -> dict[str, nn.Module]:
    found = modules(target).named_modules()
    return {p: m for p, m in found if p.endswith(ends) and isinstance(m, nn.Linear) and "expert" not in p}


def write_adapters(target: TextModel, kind: str, folder: Path) -> dict[str, str]:
    """Two of different ranks, forms and layers."""
    attention = {path: sizes(module) for path, module in projections(target, ATTENTION[kind]).items()}
    whole = {path: sizes(module) for path, module in projections(target, WHOLE[kind]).items()}
    assert len(whole) > len(attention) > 1
    write_mlx(folder / "attention", attention, rank=3, seed=1)
    write_peft(folder / "everything", whole, rank=5, alpha=6.0, seed=2)
    return {name: str(folder / name) for name in NAMES[1:]}


def merged(kind: str, place: str) -> TextModel:
    """W + (A B)^T in each projection, by a way of its own."""
    target = MODELS[kind]()
    adapter = read("merged", place)
    linears = dict(modules(target).named_modules())
    for path, (a, b) in adapter.pairs.items():
        linears[path].weight = linears[path].weight + (a @ b).T
    return target


class World:
    """One adapted engine with a prefix cache, and what each request is to get."""

    def __init__(self, kind: str, layout: str, folder: Path) -> None:
        target = MODELS[kind]()
        self.places = write_adapters(target, kind, folder)
        self.vocab_size = target.vocab_size
        adapters = install(modules(target), self.places, mx.float32)
        self.engine = make_engine(target, num_slots=5, block_size=BLOCK, layout=layout, adapters=adapters)
        self.prompts = {n: [t % self.vocab_size for t in p] for n, p in PROMPTS.items()}
        rng = random.Random(2)
        self.chosen = {name: rng.choice(NAMES) for name in self.prompts}
        assert set(self.chosen.values()) == set(NAMES)
        self.truth = {name: self.alone(name) for name in self.prompts}

    def alone(self, name: str) -> list[int]:
        """Of a run without anybody else, and without the cache."""
        blocks, self.engine.blocks = self.engine.blocks, None
        try:
            more = {"adapter": self.chosen[name]}
            return EngineRig(self.engine).run({name: self.prompts[name]}, NUM_TOKENS, self.sampling(name), **more)[name]
        finally:
            self.engine.blocks = blocks

    def sampling(self, name: str) -> SamplingParams:
        return SEEDED if int(name[1:]) % 3 == 0 else GREEDY

    def submit(self, rig: EngineRig, name: str) -> None:
        rig.submit(name, self.prompts[name], NUM_TOKENS, self.sampling(name), adapter=self.chosen[name])


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(*request.param, tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_gives_the_tokens_of_a_model_it_is_merged_into(kind: str, tmp_path: Path) -> None:
    world = World(kind, "slots", tmp_path)
    for adapter, place in world.places.items():
        engine = make_engine(merged(kind, place), num_slots=5)
        names = [name for name in world.prompts if world.chosen[name] == adapter]
        assert len(names) > 2
        for name in names:
            expected = EngineRig(engine).run({name: world.prompts[name]}, NUM_TOKENS, world.sampling(name))
            assert world.truth[name] == expected[name]


def test_adapters_change_the_text(world: World) -> None:
    texts = [EngineRig(world.engine).run(world.prompts, NUM_TOKENS, adapter=adapter) for adapter in NAMES]
    for one, other in itertools.combinations(texts, 2):
        assert sum(one[name] != other[name] for name in world.prompts) > len(world.prompts) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [None, 3])
def test_mixed_batches_give_what_each_request_gets_alone(world: World, seed: int, k: int | None) -> None:
    """Joining, drafted for, preempted, restored, and after the loss of the target."""
    rng = random.Random(seed)
    known = {name: [*world.prompts[name], *world.truth[name]] for name in world.prompts}
    drafter = ForcedDrafts(known, dict.fromkeys(known, 0.7), rng) if k is not None else None
    rig = EngineRig(world.engine, drafter, k=k, num_blocks=rng.choice((9, 60)), prefix_check_rate=0.5)
    for i, name in enumerate(world.prompts):
        world.submit(rig, name)
        for _ in range(rng.randrange(4)):
            rig.work()
        if rng.random() < 0.3 and rig.core.running:
            rig.session.preempt(rng.choice(rig.core.running))
        if i == 7:
            rig.lose_target()
    rig.drain()
    assert {name: rig.tokens(name) for name in world.prompts} == world.truth
    assert rig.core.metrics.prefix.checks["different"] == 0


def test_no_adapter_meets_the_blocks_of_another(world: World) -> None:
    prompt = [(7 * i + 3) % world.vocab_size for i in range(40)]
    rig = EngineRig(world.engine, num_blocks=80, prefix_check_rate=1.0)
    for repeat in range(2):
        for adapter in NAMES:
            name = f"{adapter}{repeat}"
            rig.run({name: prompt}, 4, adapter=adapter)
            timings = rig.outputs[name][-1].timings
            assert timings is not None
            assert (timings.num_cached_tokens > 30) == bool(repeat), (adapter, repeat, timings)
    checks = rig.core.metrics.prefix.checks
    assert checks["different"] == 0
    if world.engine.blocks is not None and rig.session.prefix is not None and rig.session.prefix.info.is_checkable:
        assert checks["equal"] > 0


def test_an_unknown_adapter_is_refused(world: World) -> None:
    rig = EngineRig(world.engine)
    with pytest.raises(AssertionError, match="no adapter 'other' here"):
        rig.submit("r", world.prompts["r0"], 4, adapter="other")


def test_a_target_without_the_adapter_fails_its_requests_alone(world: World) -> None:
    rig = EngineRig(world.engine)
    base = next(name for name in world.prompts if not world.chosen[name])
    adapted = next(name for name in world.prompts if world.chosen[name])
    world.submit(rig, base)
    world.submit(rig, adapted)
    for _ in range(4):
        rig.work()
    info = rig.core.target.info
    assert info is not None
    rig.core.target.info = msgspec.structs.replace(info, adapters={})
    kept, world.engine.adapters = world.engine.adapters, None
    assert kept is not None
    kept.select([""])
    try:
        rig.lose_target()
        rig.drain()
    finally:
        world.engine.adapters = kept
    assert rig.tokens(base) == world.truth[base]
    last: Output = rig.outputs[adapted][-1]
    assert last.finish_reason == "error" and "not served any more" in (last.error or "")


def test_quantised_projections_are_adapted(tmp_path: Path) -> None:
    """As on a GPU, where they stay packed."""
    mx.random.seed(1)
    model = nn.Sequential(nn.Linear(64, 32, bias=True), nn.Linear(32, 64, bias=False))
    nn.quantize(model, group_size=32, bits=4)
    place = write_peft(tmp_path, {"layers.0": (64, 32), "layers.1": (32, 64)}, rank=4, alpha=8.0)
    x = mx.random.normal((2, 3, 64))
    plain = model(x)
    pairs = read("a", str(place)).pairs
    expected = x
    for i, layer in enumerate(list(model.layers)):
        a, b = pairs[f"layers.{i}"]
        expected = layer(expected) + expected @ a @ b
    with pytest.raises(Exception, match="no linear layer"):
        install(model, {"a": str(place)}, mx.float32)  # "layers.0" is a layer, not a projection in one
    held = nn.Sequential(nn.Identity())
    held.layers = [model]
    place = write_peft(tmp_path, {"layers.0.layers.0": (64, 32), "layers.0.layers.1": (32, 64)}, rank=4, alpha=8.0)
    adapters = install(held, {"a": str(place)}, mx.float32)
    adapters.select(["a", ""])
    got = held(x)
    np.testing.assert_allclose(np.array(got[0]), np.array(expected[0]), atol=1e-4)
    np.testing.assert_array_equal(np.array(got[1]), np.array(plain[1]))
