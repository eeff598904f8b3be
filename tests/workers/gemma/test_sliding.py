"""Texts many times longer than the window: batched, in chunks, speculating across its edge; tokens of a plain run."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from tests.support.engine_rig import EngineRig, ForcedDrafts, make_engine
from tests.workers.gemma import hf
from workers.kernels.choice import AttentionChoice, ShapeClass
from workers.kernels.reference import ReferenceAttention
from workers.models.gemma.config import GemmaConfig
from workers.models.own import OWN

pytestmark = pytest.mark.mlx

SHARED = {"num_hidden_layers": 6, "layer_types": [*hf.KINDS[:2], *hf.KINDS], "num_kv_shared_layers": 2}
TARGETS = {
    "gemma4 shared kv, per-layer embeddings": {
        **hf.GEMMA4, **SHARED, "model_type": "gemma4_text", "hidden_size_per_layer_input": 12,
        "final_logit_softcapping": 30.0,
    },
    "gemma4 experts, k = v": {
        **hf.GEMMA4, "model_type": "gemma4_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 24,
    },
    "gemma3": {**hf.GEMMA3, "model_type": "gemma3_text"},
}  # fmt: skip
NUM_TOKENS = 5 * hf.WINDOW
CLASSES = [16, 48, 160]


def make_target(name):
    config = TARGETS[name] | {"vocab_size": 50, "vocab_size_per_layer_input": 50}
    mx.random.seed(2)
    return with_larger_matrices(OWN[config["model_type"]].model(GemmaConfig.from_hf(config, 0)))


def with_larger_matrices(model):
    """Matrices only: norms and layer scalars keep their size, so that a greedy text wanders."""
    model.update(
        tree_unflatten([(n, a * 3.0 if n.endswith("proj.weight") else a) for n, a in tree_flatten(model.parameters())])
    )
    mx.eval(model.parameters())
    return model


def prompts():
    rng = random.Random(4)
    lengths = (1, 100, 5, 61, 9, 33)  # up to twelve windows, next to short ones
    return {f"r{i}": [rng.randrange(50) for _ in range(n)] for i, n in enumerate(lengths)}


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    """(model, each prompt's tokens when it runs alone); an uncached forward over the whole text confirms them."""
    model = make_target(request.param)
    engine = make_engine(model, classes=CLASSES, max_width=128)
    expected = {}
    for name, prompt in prompts().items():
        expected |= EngineRig(engine).run({name: prompt}, NUM_TOKENS)
        logits = model(mx.array([prompt + expected[name]]))[0, len(prompt) - 1 : -1]
        assert mx.argmax(logits, axis=-1).tolist() == expected[name]
    assert len({t for tokens in expected.values() for t in tokens}) > 5, "a text that tells nothing"
    return model, expected


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact lengths", "rounded lengths"])
def test_batched_and_chunked(target, is_exact):
    model, expected = target
    engine = make_engine(model, classes=CLASSES, is_exact=is_exact)
    assert EngineRig(engine).run(prompts(), NUM_TOKENS, schedule=random.Random(1)) == expected


def test_with_attention_by_a_kernel(target):
    """Layers that write go through it, layers that read another's keys through the stock operation, in one forward."""
    model, expected = target
    engine = make_engine(model, classes=CLASSES, is_exact=False)
    shapes = {
        ShapeClass(4, spec.num_kv_heads, spec.key_dim, rows, mx.float32): True
        for spec in model.layer_specs()
        for rows in (0, 1, 2, 4, 8, 16)
    }
    engine.store.use_attention(AttentionChoice(ReferenceAttention(), shapes))
    assert EngineRig(engine).run(prompts(), NUM_TOKENS, schedule=random.Random(1)) == expected


def test_speculation_across_the_edge_of_the_window(target):
    model, expected = target
    engine = make_engine(model, classes=CLASSES)
    known = {name: prompt + expected[name] for name, prompt in prompts().items()}
    known |= {f"stranger{i}": prompt[::-1] + expected[f"r{i}"] for i, prompt in enumerate(prompts().values())}
    chances = {name: (0.0, 0.5, 0.8, 1.0)[i % 4] for i, name in enumerate(known)}
    rig = EngineRig(engine, ForcedDrafts(known, chances), k=6)
    assert rig.run(prompts(), NUM_TOKENS, schedule=random.Random(2)) == expected
    drafted, accepted = rig.counts(list(prompts()))
    assert 0 < accepted < drafted


def test_prefix_hits_keep_the_window(target):
    model, expected = target
    rig = EngineRig(make_engine(model, classes=CLASSES, block_size=8), num_blocks=128)
    for turn in range(2):
        names = {f"{name} {turn}": prompt for name, prompt in prompts().items()}
        got = rig.run(names, NUM_TOKENS)
        assert got == {f"{name} {turn}": expected[name] for name in expected}
    cached = [o.timings.num_cached_tokens for outs in rig.outputs.values() for o in outs if o.timings is not None]
    assert max(cached) >= 8 * hf.WINDOW, "the second turn hits nothing"


def test_a_layer_that_writes_no_keys_has_no_cache():
    model = make_target("gemma4 shared kv, per-layer embeddings")
    assert len(model.layer_specs()) == 4
    assert [spec.window for spec in model.layer_specs()] == [hf.WINDOW, None] * 2
    assert np.array(model(mx.array([[1, 2]]))).shape == (1, 2, 50)
