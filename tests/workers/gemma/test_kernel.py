"""A Gemma whose layers are of several shapes, with attention as `TANDEM_ATTENTION=kernel` chooses it: some layers go
through the kernel, which the reference stands for on a CPU, and the tokens are those of stock operations."""

from __future__ import annotations

import random
from collections import Counter

import mlx.core as mx
import pytest

from shared.config import Settings
from tests.support.engine_rig import EngineRig, ForcedDrafts, make_engine
from tests.workers.gemma import hf
from tests.workers.gemma.test_sliding import with_larger_matrices
from workers import choose_attention
from workers.kernels import select as selecting
from workers.kernels.reference import ReferenceAttention
from workers.load import LoadedModel
from workers.models.gemma.config import GemmaConfig
from workers.models.own import OWN

pytestmark = pytest.mark.mlx

VOCAB, NUM_TOKENS, CLASSES = 50, 3 * hf.WINDOW, [16, 48, 160]
MAX_WIDTH = 32  # rings of 96 positions, in which the longest text wraps
# Heads of a size that the kernel takes in sliding layers, and of one that it does not take in full ones.
SIZES = {"head_dim": 64, "global_head_dim": 512, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
TARGETS = {
    "gemma4": {**hf.GEMMA4, **SIZES, "model_type": "gemma4_text"},
    "gemma4, shared keys": {
        **hf.GEMMA4,
        **SIZES,
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 12,
        "num_hidden_layers": 7,
        "layer_types": [*hf.KINDS[:2], *hf.KINDS[:1], *hf.KINDS],
        "num_kv_shared_layers": 4,
    },
    "gemma4, shared keys, every layer": {
        **hf.GEMMA4,
        **SIZES,
        "model_type": "gemma4_text",
        "global_head_dim": 128,
        "num_hidden_layers": 6,
        "layer_types": [*hf.KINDS[:2], *hf.KINDS],
        "num_kv_shared_layers": 4,
    },
    "gemma3": {**hf.GEMMA3, "vocab_size": VOCAB, "head_dim": 64, "model_type": "gemma3_text"},
}


class Counted(ReferenceAttention):
    """Counts calls by (head size, query rows): of layers that write, and of those that read what another wrote."""

    def __init__(self) -> None:
        self.writing: Counter[tuple[int, int]] = Counter()
        self.reading: Counter[tuple[int, int]] = Counter()

    def attend(self, q, k, v, pool, pages, variant):
        self.writing[q.shape[-1], q.shape[2]] += 1
        return super().attend(q, k, v, pool, pages, variant)

    def attend_written(self, q, pool, pages, variant):
        self.reading[q.shape[-1], q.shape[2]] += 1
        return super().attend_written(q, pool, pages, variant)


def make_target(config):
    mx.random.seed(2)
    return with_larger_matrices(OWN[config["model_type"]].model(GemmaConfig.from_hf(config, 0)))


def prompts():
    rng = random.Random(4)
    return {f"r{i}": [rng.randrange(VOCAB) for _ in range(n)] for i, n in enumerate((1, 100, 5, 33))}


def tokens_alone(model):
    """Each prompt's tokens when it runs alone, by stock operations at exact lengths."""
    engine = make_engine(model, classes=CLASSES, max_width=MAX_WIDTH)
    found = {}
    for name, prompt in prompts().items():
        found |= EngineRig(engine).run({name: prompt}, NUM_TOKENS)
    assert len({t for tokens in found.values() for t in tokens}) > 5, "a text that tells nothing"
    return found


def engine_by_kernel(model, config, monkeypatch, layout="slots"):
    """(engine, what counts the kernel's calls): as a target is built, on a machine whose kernel is the reference."""
    counted = Counted()
    monkeypatch.setattr(selecting, "machine_kernel", lambda: counted)
    engine = make_engine(model, classes=CLASSES, max_width=MAX_WIDTH, is_exact=False, layout=layout)
    loaded = LoadedModel(
        model=model, config=config, name="m", architecture=config["model_type"], fingerprint="m", eos_token_ids=[],
        max_model_len=CLASSES[-1], vocab_size=VOCAB, dtype="float32",
    )  # fmt: skip
    settings = Settings(attention="kernel", draft_model="ngram", kv_layout=layout)
    chosen = choose_attention.choose(loaded, settings)
    assert chosen.layout == layout
    assert chosen.attention is not None, "no kernel serves"
    choose_attention.install(chosen.attention, loaded, engine.store)
    counted.writing.clear()
    counted.reading.clear()
    return engine, counted


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    """(name, model, each prompt's tokens when it runs alone by stock operations)."""
    model = make_target(TARGETS[request.param])
    return request.param, model, tokens_alone(model)


def check_calls(name, counted, has_verify_rows):
    """Decode rows, and verify rows where there are drafts, of all layers of a size that the kernel takes."""
    sizes = {64, 128} if name.endswith("every layer") else {64}
    for calls in (counted.writing, counted.reading):
        if calls is counted.reading and "shared" not in name:
            assert not calls
            continue
        assert {dim for dim, _ in calls} == sizes
        assert all(calls[dim, 1] for dim in sizes)
        assert any(rows > 1 for _, rows in calls) or not has_verify_rows
    if name == "gemma4, shared keys":  # two sliding layers write, two read the rows of one of them
        assert counted.reading == counted.writing


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_ragged_batches(target, layout, monkeypatch):
    name, model, expected = target
    engine, counted = engine_by_kernel(model, TARGETS[name], monkeypatch, layout)
    assert EngineRig(engine).run(prompts(), NUM_TOKENS, schedule=random.Random(1)) == expected
    rings = [layer for layer in engine.store.kv_layers if layer.spec.window is not None]
    assert all(layer.capacities[-1] < 100 + NUM_TOKENS for layer in rings), "no ring wraps"
    check_calls(name, counted, has_verify_rows=False)


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_verify_rows(target, layout, monkeypatch):
    name, model, expected = target
    engine, counted = engine_by_kernel(model, TARGETS[name], monkeypatch, layout)
    known = {key: prompt + expected[key] for key, prompt in prompts().items()}
    rig = EngineRig(engine, ForcedDrafts(known, {key: (0.5, 0.8, 1.0)[i % 3] for i, key in enumerate(known)}), k=6)
    assert rig.run(prompts(), NUM_TOKENS, schedule=random.Random(2)) == expected
    drafted, accepted = rig.counts(list(prompts()))
    assert 0 < accepted < drafted
    check_calls(name, counted, has_verify_rows=True)


def test_what_layers_share_is_told_by_cache():
    model = make_target(TARGETS["gemma4, shared keys"])
    assert model.query_heads() == [4, 4, 4]
    assert model.shared_layers() == [1, 2]
    assert make_target(TARGETS["gemma4"]).shared_layers() == []
