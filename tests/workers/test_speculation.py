"""Speculation through the real core, engine and drafters: the text is that of plain decoding, whatever is drafted."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import itertools
import random

import mlx.core as mx
import pytest

from shared.messages import SamplingParams
from tests.support.engine_rig import (
    GREEDY,
    VOCAB,
    WINDOW,
    EngineRig,
    ForcedDrafts,
    decoder_target,
    make_engine,
    make_prompts,
    mlx_lm_target,
)
from tests.workers.drafters import tiny_checkpoints as tiny
from tests.workers.tiny_architectures import RUNS
from workers.cache.spec import AttentionSpec
from workers.draft_engine import DraftEngine
from workers.drafters.causal_lm import CausalLMDrafter
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, load_fusion, tables

pytestmark = pytest.mark.mlx

NUM_TOKENS = 24  # past the window of the sliding layers for every prompt
HYBRIDS = ("qwen3_next", "lfm2", "mamba2", "falcon_h1")
TARGETS = {
    "plain": decoder_target,
    "sliding": lambda: decoder_target(window=WINDOW),
    **{name: lambda name=name: mlx_lm_target(name) for name in HYBRIDS},
}
PROMPTS = make_prompts(16)


@pytest.fixture(scope="module")
def plain():
    """Target name -> (engine, greedy tokens of PROMPTS without speculation), computed on first use.

    The tokens are those of the slots layout, whatever the engine's is.
    """
    made = {}

    def get(name, layout="slots"):
        if (name, "slots") not in made:
            engine = make_engine(TARGETS[name]())
            made[name, "slots"] = engine, EngineRig(engine).run(PROMPTS, NUM_TOKENS)
            assert len({t for tokens in made[name, "slots"][1].values() for t in tokens}) > 5, (
                "a text that tells nothing"
            )
        if (name, layout) not in made:
            model = made[name, "slots"][0].model.model
            made[name, layout] = make_engine(model, layout=layout), made[name, "slots"][1]
        return made[name, layout]

    return get


@pytest.fixture(scope="module")
def few(plain):
    """Target name -> greedy tokens of PROMPTS out of three only, computed on first use."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = EngineRig(plain(name)[0]).run(PROMPTS, NUM_TOKENS, FEW)
        return made[name]

    return get


def truth(tokens):
    """Prompt and output; strangers of a random schedule are drafted for with whatever is there."""
    known = {name: PROMPTS[name] + output for name, output in tokens.items()}
    return known | {f"stranger{i}": PROMPTS[f"r{i}"][::-1] + tokens[f"r{i}"] for i in range(len(tokens))}


@pytest.mark.parametrize(("batch", "layout"), [(1, "slots"), (4, "slots"), (16, "slots"), (4, "paged")])
@pytest.mark.parametrize("target", TARGETS)
def test_forced_acceptances_that_differ_by_row_leave_the_greedy_text_as_it_is(plain, target, batch, layout):
    engine, expected = plain(target, layout)
    prompts = dict(list(PROMPTS.items())[:batch])
    chances = {name: (0.0, 0.4, 0.8, 1.0)[i % 4] for i, name in enumerate(prompts)}
    chances |= {f"stranger{i}": 0.5 for i in range(batch)}
    rig = EngineRig(engine, ForcedDrafts(truth(expected), chances), k=5)
    got = rig.run(prompts, NUM_TOKENS, schedule=random.Random(batch))
    assert got == {name: expected[name] for name in prompts}
    for name in prompts:
        drafted, accepted = rig.counts([name])
        assert drafted > 0
        assert accepted == {0.0: 0, 1.0: drafted}.get(chances[name], accepted)


def feature_drafter(kind, folder, engine):
    """A tiny random checkpoint of this kind, its fusion installed in the target."""
    model = engine.model.model
    folder, _ = getattr(tiny, kind)(folder)
    config = detect(folder)
    engine.model.capture(config.taps, load_fusion(config, mx.float32))
    return DraftEngine(load_drafter(config, mx.float32, model.embed, model.logits), needs_features=True)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("kind", ["eagle3", "dflash", "mtp"])
@pytest.mark.parametrize("target", ["plain", "sliding"])
def test_feature_drafters_leave_the_greedy_text_as_it_is(plain, tmp_path, target, kind, batch):
    _, expected = plain(target)
    engine = make_engine(TARGETS[target]())
    drafter = feature_drafter(kind, tmp_path / kind, engine)
    prompts = dict(list(PROMPTS.items())[:batch])
    rig = EngineRig(engine, drafter, k=3)
    assert rig.run(prompts, NUM_TOKENS, schedule=random.Random(2)) == {name: expected[name] for name in prompts}
    assert rig.counts(list(prompts))[0] >= batch * NUM_TOKENS / 4, "hardly anything was drafted"


DEEP = {"hidden_size": tiny.H, "vocab_size": VOCAB, "num_hidden_layers": 6}  # as the tiny checkpoints want it
DEEP_HYBRIDS = {
    "qwen3_next": {},
    "qwen3_5": {"text_config": RUNS["qwen3_5"]["text_config"] | DEEP},
    "lfm2": {"block_dim": tiny.H, "layer_types": ["conv", "full_attention", "conv"] * 2},
}


class Corrected(ForcedDrafts):
    """A feature drafter that takes everything in and drafts; then its tokens give way to right and wrong ones."""

    def __init__(self, inner, truth, chances):
        super().__init__(truth, chances)
        self.inner, self.num_drafted = inner, 0
        self.take_tokens, self.take_features, self.end = inner.take_tokens, inner.take_features, inner.end

    def draft(self, rows):
        drafts = self.inner.draft(rows)
        self.num_drafted += sum(bool(d.token_ids) for d in drafts)
        return [self._draft(row) if drafted.token_ids else drafted for row, drafted in zip(rows, drafts, strict=True)]


@pytest.mark.parametrize(
    ("target", "kind", "batch"),
    [
        *(("lfm2", kind, batch) for kind in ("eagle3", "dflash") for batch in (1, 4, 16)),
        ("qwen3_next", "eagle3", 3),
        ("qwen3_5", "dflash", 3),
        *(("qwen3_5", "mtp", batch) for batch in (1, 4, 16)),
    ],
)
def test_feature_drafters_on_hybrid_targets_with_acceptances_that_differ_by_row(tmp_path, target, kind, batch):
    """The features of a recurrent target are those of committed tokens too, when accepted tokens are fed again."""
    engine = make_engine(mlx_lm_target(target, **DEEP, **DEEP_HYBRIDS[target]))
    prompts = dict(list(PROMPTS.items())[:batch])
    expected = EngineRig(engine).run(prompts, NUM_TOKENS)
    folder, _ = getattr(tiny, kind)(tmp_path / kind)
    config = detect(folder)
    engine.model.capture(config.taps, load_fusion(config, mx.float32))
    drafter = load_drafter(config, mx.float32, *tables(mx.random.normal((VOCAB, tiny.H))))
    chances = {name: (0.0, 0.4, 0.8, 1.0)[i % 4] for i, name in enumerate(prompts)}
    truth = {name: prompts[name] + output for name, output in expected.items()}
    corrected = Corrected(DraftEngine(drafter, needs_features=True), truth, chances)
    rig = EngineRig(engine, corrected, k=4)
    assert rig.run(prompts, NUM_TOKENS) == expected
    assert corrected.num_drafted >= batch * NUM_TOKENS / 6, "hardly anything was drafted"
    for name in prompts:
        drafted, accepted = rig.counts([name])
        assert accepted == {0.0: 0, 1.0: drafted}.get(chances[name], accepted)


def random_model(seed):
    return CausalLMDrafter(decoder_lm(seed), VOCAB)


def decoder_lm(seed):
    """mlx-lm's own llama, since the independent draft model keeps mlx-lm's caches."""
    from mlx_lm.models import llama

    from tests.support.engine_rig import shuffle_weights

    mx.random.seed(seed)
    made = llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=24, num_hidden_layers=2, intermediate_size=40, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=VOCAB,
        )
    )  # fmt: skip
    shuffle_weights(made)
    return made


FEW = SamplingParams(temperature=0.0, logit_bias={3: 100.0, 7: 100.0, 11: 100.0})  # three tokens: n-grams recur


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize(
    ("kind", "target"),
    [("model", "plain"), ("model", "sliding"), ("model", "lfm2"), ("ngram", "plain"), ("ngram", "sliding"),
     ("ngram", "qwen3_next"), ("ngram then model", "plain")],
)  # fmt: skip
def test_token_drafters_leave_the_greedy_text_as_it_is(plain, few, target, kind, batch):
    engine, greedy = plain(target)
    drafter = DraftEngine(random_model(9), needs_features=False) if "model" in kind else None
    rig = EngineRig(engine, drafter, k=4, ngram="ngram" in kind)
    prompts = dict(list(PROMPTS.items())[:batch])
    sampling, expected = (FEW, few(target)) if "ngram" in kind else (GREEDY, greedy)
    got = rig.run(prompts, NUM_TOKENS, sampling, schedule=random.Random(3))
    assert got == {name: expected[name] for name in prompts}
    drafted, accepted = rig.counts(list(prompts))
    assert drafted > 0
    assert accepted > 0 or "ngram" not in kind


def test_the_target_as_its_own_drafter_has_every_draft_accepted_and_a_random_one_hardly_any():
    model = decoder_lm(4)
    model.layer_specs = lambda: [AttentionSpec(2, 6, 6)] * 2
    model.vocab_size = VOCAB
    engine = make_engine(model)
    prompts = make_prompts(6, seed=8)
    expected = EngineRig(engine).run(prompts, NUM_TOKENS)
    for drafter, low, high in ((CausalLMDrafter(model, VOCAB), 1.0, 1.0), (random_model(9), 0.0, 0.15)):
        rig = EngineRig(engine, DraftEngine(drafter, needs_features=False), k=4)
        assert rig.run(prompts, NUM_TOKENS) == expected
        drafted, accepted = rig.counts(list(prompts))
        assert drafted > 100
        assert low <= accepted / drafted <= high


def test_eagle3_with_a_reduced_vocabulary_commits_only_what_the_full_vocabulary_has_on_top(plain, tmp_path):
    _, expected = plain("plain")
    engine = make_engine(decoder_target())
    model = engine.model.model
    folder, arrays = tiny.eagle3(tmp_path / "e", draft_vocab_size=20, own_head=True)
    config = detect(folder)
    engine.model.capture(config.taps, load_fusion(config, mx.float32))
    drafter = DraftEngine(load_drafter(config, mx.float32, model.embed, model.logits), needs_features=True)
    proposed = []
    original = drafter.draft
    drafter.draft = lambda rows: [proposed.append(d) or d for d in original(rows)]
    rig = EngineRig(engine, drafter, k=3)
    assert rig.run(PROMPTS, NUM_TOKENS) == expected
    known = {int(i + d) for i, d in enumerate(arrays["d2t"])}
    tokens = {t for draft in proposed for t in draft.token_ids}
    assert tokens, "nothing was drafted"
    assert tokens <= known, "a draft outside the reduced vocabulary"
    accepted = rig.counts(list(PROMPTS))[1]
    right = sum(
        sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(d.token_ids, after, strict=False)))
        for d in proposed
        for after in [(PROMPTS[d.request_id] + expected[d.request_id])[d.anchor + 1 :]]
    )
    assert accepted == right, "accepted something else than the greedy text"


RICH = {
    "seed": SamplingParams(temperature=0.9, seed=11, is_seeded=True),
    "greedy with logprobs": SamplingParams(temperature=0.0, num_logprobs=4),
    "filters": SamplingParams(temperature=1.1, seed=12, top_k=9, top_p=0.8, min_p=0.02, num_logprobs=2),
    "penalties": SamplingParams(
        temperature=0.8, seed=13, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, num_logprobs=0
    ),
    "greedy with penalties and bias": SamplingParams(
        temperature=0.0, frequency_penalty=1.5, logit_bias={5: 3.0, 6: -100.0}, num_logprobs=1
    ),
}


@pytest.mark.parametrize("target", ["plain", "sliding", "lfm2"])
def test_seed_logprobs_stop_tokens_penalties_and_bias_give_the_same_answer_with_a_drafter(plain, target):
    engine, _ = plain(target)
    prompts = {name: PROMPTS[f"r{i}"] for i, name in enumerate(RICH)}
    reference = EngineRig(engine)
    expected = reference.run(prompts, NUM_TOKENS, RICH, stop_token_ids=[17, 30], min_tokens=4)
    full = EngineRig(engine).run(prompts, NUM_TOKENS, RICH)
    known = {name: prompts[name] + full[name] for name in prompts}
    for chance in (0.3, 0.9, 1.0):
        drafter = ForcedDrafts(known, dict.fromkeys(prompts, chance))
        rig = EngineRig(engine, drafter, k=5)
        assert rig.run(prompts, NUM_TOKENS, RICH, stop_token_ids=[17, 30], min_tokens=4) == expected
        assert rig.counts(list(prompts))[1] > 0
        for name, sampling in RICH.items():
            got, want = rig.logprobs(name), reference.logprobs(name)
            assert len(got) == len(want) == (0 if sampling.num_logprobs is None else len(expected[name]))
            for a, b in zip(got, want, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
                assert [t.token_id for t in a.top] == [t.token_id for t in b.top]
                assert [t.logprob for t in a.top] == pytest.approx([t.logprob for t in b.top], abs=1e-5)
