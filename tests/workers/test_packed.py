"""Rows of different widths packed into one batch row give what each gives alone."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import pytest

from tests.support.engine_rig import (
    VOCAB,
    WINDOW,
    EngineRig,
    ForcedDrafts,
    decoder_target,
    make_engine,
    make_prompts,
    shuffle_weights,
)
from tests.workers.gemma.test_sliding import TARGETS as GEMMA
from tests.workers.gemma.test_sliding import make_target as gemma_target
from workers.cache.packed import join, stretches
from workers.cache.store import CacheStore
from workers.models.qwen.config import QwenConfig
from workers.models.qwen.model import QwenVL
from workers.models.rope import QueryScaling

pytestmark = pytest.mark.mlx


def experts_target():
    """Qwen3-VL with experts in every second layer, without its image encoder."""
    text = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCAB, "num_experts": 6, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "decoder_sparse_step": 2, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1],
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24,
        "num_position_embeddings": 4,
    }  # fmt: skip
    mx.random.seed(0)
    config = {"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": vision}
    model = QwenVL(QwenConfig.from_hf(config, 256))
    model.pop("vision_tower")
    shuffle_weights(model)
    return model


def scaling_target():
    """Queries grow with their position, as Ministral 3's do."""
    model = decoder_target()
    model.config = replace(model.config, query_scaling=QueryScaling(0.7, 8))
    return model


TARGETS = {
    "plain": decoder_target,
    "scaled queries": scaling_target,
    "sliding": lambda: decoder_target(window=WINDOW),
    "experts": experts_target,
    **{name: lambda name=name: gemma_target(name) for name in GEMMA},
}
LENGTHS = [3, 40, 17, 9, 60, 26]  # two classes of slots; some beyond the window's ring
NUM_TOKENS = 24


def test_adjacent_rows_of_one_width_are_one_stretch():
    places = [(1, 4), (0, 2), (0, 0), (0, 1), (1, 3), (0, 3)]
    widths = [2, 1, 1, 1, 2, 5]
    order, parts = stretches(places, starts=[10, 11, 12, 13, 14, 15], widths=widths)
    assert order == [2, 3, 1, 5, 4, 0]
    assert [(p.first, p.end, p.shape.starts, p.shape.width) for p in parts] == [
        (0, 3, [12, 13, 11], 1),
        (3, 8, [15], 5),
        (8, 12, [14, 10], 2),
    ]
    assert [(r.capacity_class, r.row, r.first, r.size) for p in parts for r in p.shape.runs] == [
        (0, 0, 0, 3),
        (0, 3, 0, 1),
        (1, 3, 0, 2),
    ]
    tokens = mx.arange(12 * 3 * 2).reshape(1, 12, 3, 2).swapaxes(1, 2)
    for part in parts:
        cut = part.cut(tokens)
        assert cut.shape == (len(part.shape.starts), 3, part.shape.width, 2)
        assert np.array_equal(np.array(join(cut)), np.array(tokens[:, :, part.first : part.end]))


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return TARGETS[request.param]()


def filled(model, texts):
    """A store whose slot i holds the first half of texts[i], in chunks."""
    store = CacheStore(model.layer_specs(), [96, 160], 32, mx.float32, is_exact=True)
    for slot, text in enumerate(texts):
        store.ensure(slot, len(text) + 20)
        at = 0
        while at < len(text) // 2:
            end = min(at + 20, len(text) // 2)
            mx.eval(model.hidden(mx.array([text[at:end]]), cache=store.open([slot], [at], end - at).layers))
            at = end
    return store


def test_hidden_rows_are_those_of_each_row_alone_for_several_steps(target):
    rng = random.Random(3)
    texts = [[rng.randrange(VOCAB) for _ in range(n + 60)] for n in LENGTHS]
    packed, alone = filled(target, texts), filled(target, texts)
    at = [len(text) // 2 for text in texts]
    for _ in range(4):
        slots = rng.sample(range(len(texts)), rng.randrange(3, len(texts) + 1))
        widths = [rng.choice((1, 1, 2, 5, 9)) for _ in slots]
        batch = packed.open_packed(slots, [at[s] for s in slots], widths)
        rows = [(slots[i], widths[i]) for i in batch.order]
        tokens = [t for slot, width in rows for t in texts[slot][at[slot] : at[slot] + width]]
        hidden = np.array(target.hidden(mx.array([tokens]), cache=batch.layers))[0]
        for (slot, width), first in zip(rows, batch.firsts, strict=True):
            own = mx.array([texts[slot][at[slot] : at[slot] + width]])
            expected = target.hidden(own, cache=alone.open([slot], [at[slot]], width).layers)
            np.testing.assert_allclose(hidden[first : first + width], np.array(expected)[0], rtol=1e-4, atol=1e-4)
            at[slot] += width


@pytest.fixture
def packings(monkeypatch):
    """Widths of every packed forward."""
    seen = []
    original = CacheStore.open_packed

    def counted(self, slots, starts, widths):
        seen.append(list(widths))
        return original(self, slots, starts, widths)

    monkeypatch.setattr(CacheStore, "open_packed", counted)
    return seen


def engines(model, **options):
    """(packing, padding)"""
    made = make_engine(model, **options), make_engine(model, **options)
    assert made[0].packs_rows, "a model whose rows can be packed"
    made[1].packs_rows = False
    return made


def test_tokens_are_those_of_padded_rows_while_prompts_and_drafts_come_and_go(target, packings):
    packing, padding = engines(target, block_size=16)
    prompts = make_prompts(12)
    expected = EngineRig(padding).run(prompts, NUM_TOKENS)
    assert not packings
    truth = {name: [*prompt, *expected[name]] for name, prompt in prompts.items()}
    chances = {name: (0.3, 0.7, 1.0)[i % 3] for i, name in enumerate(prompts)}
    for seed in range(2):
        drafts = ForcedDrafts(truth, chances | {f"stranger{i}": 0.5 for i in range(12)})
        drafts.truth = truth | {f"stranger{i}": p[::-1] + p for i, p in enumerate(prompts.values())}
        assert EngineRig(packing, drafts, k=4).run(prompts, NUM_TOKENS, schedule=random.Random(seed)) == expected
    assert any(min(w) == 1 and 1 < max(w) <= 5 for w in packings), "plain rows beside drafts"
    assert any(max(w) > 5 and min(w) == 1 for w in packings), "decode rows beside a prompt"


@dataclass
class Listener(ForcedDrafts):
    """Also keeps the features that come: request -> position -> row."""

    heard: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def take_features(self, rows, array):
        for i in range(rows.num_rows):
            self.heard.setdefault(rows.request_id, {})[rows.start + i] = array[i]


def test_features_and_pooled_rows_are_those_of_padded_rows(packings):
    model = decoder_target()
    heard, pooled = [], []
    prompts = make_prompts(8)
    expected = EngineRig(make_engine(model)).run(prompts, NUM_TOKENS)
    truth = {name: [*prompt, *expected[name]] for name, prompt in prompts.items()}
    for engine in engines(model, block_size=16):
        engine.model.capture([1, 4], lambda rows: mx.concatenate(rows, axis=-1))
        listener = Listener(truth, dict.fromkeys(truth, 0.6))
        rig = EngineRig(engine, listener, k=3)
        for name, prompt in prompts.items():
            rig.submit(f"vector of {name}", prompt, 1, pooling="mean")
        assert rig.run(prompts, NUM_TOKENS) == expected
        heard.append(listener.heard)
        pooled.append([np.frombuffer(rig.outputs[f"vector of {name}"][0].embedding, "<f4") for name in prompts])
    assert packings
    np.testing.assert_allclose(pooled[0], pooled[1], rtol=1e-4, atol=1e-5)
    for name in prompts:
        ours, theirs = (features[name] for features in heard)
        # Of the last drafts, one run may have verified more than the other.
        common = sorted(ours.keys() & theirs.keys())
        assert len(common) >= len(truth[name]) - 5
        np.testing.assert_allclose([ours[p] for p in common], [theirs[p] for p in common], rtol=1e-3, atol=1e-4)
