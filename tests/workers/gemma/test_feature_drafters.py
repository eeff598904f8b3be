"""EAGLE-3 and DFlash for Gemma 4 targets: sliding layers, shared keys, experts; the text stays that of a plain run."""

from __future__ import annotations

import random
from functools import lru_cache

import mlx.core as mx
import pytest

from tests.support.engine_rig import VOCAB, EngineRig, make_engine, make_prompts
from tests.workers.drafters import tiny_checkpoints as tiny
from tests.workers.gemma import hf, test_sliding
from tests.workers.test_speculation import Corrected
from workers.build_drafter import install_fusion
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter
from workers.models.gemma.config import GemmaConfig
from workers.models.own import OWN

pytestmark = pytest.mark.mlx

SOFTCAP = 30.0
DEEP = {  # as the tiny checkpoints want it
    "hidden_size": tiny.H, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB, "num_hidden_layers": 6,
    "layer_types": [*hf.KINDS[:2], *hf.KINDS], "final_logit_softcapping": SOFTCAP,
}  # fmt: skip
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": hf.WINDOW, "use_sliding_window": True,
}  # fmt: skip
DRAFTERS = {
    "eagle3": lambda folder: tiny.eagle3(folder, rename_layer="layers.0."),
    "eagle3 with a head of its own": lambda folder: tiny.eagle3(folder, draft_vocab_size=20, own_head=True),
    "dflash": lambda folder: tiny.dflash(
        folder, dflash_config={"mask_token_id": 4}, final_logit_softcapping=SOFTCAP, **SLIDING
    ),
}
NUM_TOKENS = 4 * hf.WINDOW
PROMPTS = make_prompts(8, seed=2)


def config_of(name):
    return test_sliding.TARGETS[name] | DEEP


def target(name):
    config = config_of(name)
    mx.random.seed(2)
    model = OWN[config["model_type"]].model(GemmaConfig.from_hf(config, 0))
    return test_sliding.with_larger_matrices(model)


@lru_cache
def plain(name):
    """Greedy tokens without a drafter."""
    expected = EngineRig(make_engine(target(name))).run(PROMPTS, NUM_TOKENS)
    assert len({t for tokens in expected.values() for t in tokens}) > 5, "a text that tells nothing"
    return expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma4 shared kv, per-layer embeddings", "eagle3"),
        ("gemma4 shared kv, per-layer embeddings", "dflash"),
        ("gemma4 experts, k = v", "eagle3 with a head of its own"),
    ],
)
def test_the_text_is_that_of_plain_decoding_whatever_is_drafted_cached_and_joins(name, kind, tmp_path):
    expected = plain(name)
    folder, _ = DRAFTERS[kind](tmp_path / "drafter")
    described = detect(folder, config_of(name))
    assert described.embedding_scale == pytest.approx(tiny.H**0.5 if kind == "dflash" else 1.0), "EAGLE-3's are raw"
    engine = make_engine(target(name), block_size=16)
    install_fusion(engine.model, described, mx.float32)
    model = engine.model.model
    own = DraftEngine(
        load_drafter(described, mx.float32, model.embedding_rows, model.uncapped_logits), needs_features=True
    )
    chances = {r: (0.0, 0.5, 0.9, 1.0)[i % 4] for i, r in enumerate(PROMPTS)}
    truth = {r: PROMPTS[r] + output for r, output in expected.items()}
    corrected = Corrected(own, truth | {f"stranger{i}": p[::-1] + p for i, p in enumerate(PROMPTS.values())},
                          chances | {f"stranger{i}": 0.5 for i in range(len(PROMPTS))})  # fmt: skip
    for seed in (None, 3):
        rig = EngineRig(engine, corrected, k=3)
        schedule = None if seed is None else random.Random(seed)
        assert rig.run(PROMPTS, NUM_TOKENS, schedule=schedule) == expected
        assert rig.counts(list(PROMPTS))[1] > 0
        own.reset()
    assert corrected.num_drafted >= len(PROMPTS) * NUM_TOKENS / 4, "hardly anything was drafted"
    rig = EngineRig(engine, own, k=3)  # its own drafts, uncorrected
    assert rig.run(PROMPTS, NUM_TOKENS) == expected
