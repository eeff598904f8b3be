"""A Gemma whose layers are of several shapes, with attention as `TANDEM_ATTENTION=kernel` chooses it: some layers go
through the kernel, which the reference stands for on a CPU, and the tokens are those of stock operations."""

from __future__ import annotations

import random
from collections import Counter

import mlx.core as mx
import pytest

from shared.config import Settings
from tests.support.engine_rig import EngineRig, make_engine
from tests.support.fake_target import worker_info
from tests.workers.gemma import hf
from tests.workers.gemma.test_sliding import with_larger_matrices
from workers.build import select_attention
from workers.kernels import select as selecting
from workers.kernels.reference import ReferenceAttention
from workers.load import LoadedModel
from workers.models.gemma.config import GemmaConfig
from workers.models.own import OWN

pytestmark = pytest.mark.mlx

VOCAB, NUM_TOKENS, CLASSES = 50, 5 * hf.WINDOW, [16, 48, 160]
# Heads of a size that the kernel takes in sliding layers, and of one that it does not take in full ones.
SIZES = {"head_dim": 64, "global_head_dim": 512, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
TARGETS = {
    "gemma4": {**hf.GEMMA4, **SIZES, "model_type": "gemma4_text"},
    "gemma3": {**hf.GEMMA3, "vocab_size": VOCAB, "head_dim": 64, "model_type": "gemma3_text"},
}


class Counted(ReferenceAttention):
    """Counts calls by (head size, query rows)."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[int, int]] = Counter()

    def attend(self, q, k, v, pool, pages, variant):
        self.calls[q.shape[-1], q.shape[2]] += 1
        return super().attend(q, k, v, pool, pages, variant)


def make_target(config):
    mx.random.seed(2)
    return with_larger_matrices(OWN[config["model_type"]].model(GemmaConfig.from_hf(config, 0)))


def prompts():
    rng = random.Random(4)
    return {f"r{i}": [rng.randrange(VOCAB) for _ in range(n)] for i, n in enumerate((1, 100, 5, 61, 9, 33))}


def tokens_alone(model):
    """Each prompt's tokens when it runs alone, by stock operations at exact lengths."""
    engine = make_engine(model, classes=CLASSES, max_width=128)
    found = {}
    for name, prompt in prompts().items():
        found |= EngineRig(engine).run({name: prompt}, NUM_TOKENS)
    assert len({t for tokens in found.values() for t in tokens}) > 5, "a text that tells nothing"
    return found


def engine_by_kernel(model, config, monkeypatch, layout="slots"):
    """(engine, what counts the kernel's calls): as a target is built, on a machine whose kernel is the reference."""
    counted = Counted()
    monkeypatch.setattr(selecting, "machine_kernel", lambda: counted)
    engine = make_engine(model, classes=CLASSES, max_width=128, is_exact=False, layout=layout)
    loaded = LoadedModel(
        model=model, config=config, name="m", architecture=config["model_type"], fingerprint="m", eos_token_ids=[],
        max_model_len=CLASSES[-1], vocab_size=VOCAB, dtype="float32",
    )  # fmt: skip
    settings = Settings(attention="kernel", draft_model="ngram", kv_layout=layout)
    info = select_attention(loaded, engine, worker_info(), settings)
    assert info.attention, "no kernel serves"
    counted.calls.clear()
    return engine, counted


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_layers_of_a_supported_shape_go_through_the_kernel(name, layout, monkeypatch):
    config = TARGETS[name]
    model = make_target(config)
    expected = tokens_alone(model)
    engine, counted = engine_by_kernel(model, config, monkeypatch, layout)
    assert EngineRig(engine).run(prompts(), NUM_TOKENS, schedule=random.Random(1)) == expected
    assert {dim for dim, _ in counted.calls} == {64}
    assert counted.calls[64, 1] > NUM_TOKENS
