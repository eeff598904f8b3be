"""Gemma 4's assistant through target, features and draft engine: transformers' candidates, and an unchanged text."""

from __future__ import annotations

import json
import random

import mlx.core as mx
import numpy as np
import pytest

from bench.quantize_drafter import quantize
from shared.errors import BadModel
from shared.model_files import ModelFiles
from tests.support.engine_rig import EngineRig, make_engine, make_prompts
from tests.workers.gemma import assistants, hf
from tests.workers.test_prefix_drafters import Recorder
from workers.build_drafter import install_fusion, target_tables
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.config import DrafterConfig
from workers.drafters.registry import load_drafter
from workers.load import load

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

NUM_TOKENS = 24  # three windows
SHARED = {  # the last layers read keys of the first ones, and each layer has inputs of its own
    "num_hidden_layers": 6, "layer_types": [*hf.KINDS, "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
}  # fmt: skip
TARGETS = {"plain": {}, "shared keys": SHARED}
PROMPTS = make_prompts(16, hf.VOCAB)
K = 4


@pytest.fixture(scope="module")
def made(transformers, tmp_path_factory):
    """Target name, head -> (HF target, our target, HF assistant, its folder, the target's config), made once."""
    known = {}

    def get(target="plain", head="whole head"):
        if (target, head) not in known:
            folder = tmp_path_factory.mktemp("pair")
            reference = hf.text_model(transformers, "gemma4_text", hf.GEMMA4 | TARGETS[target])
            ours = hf.save_and_load(reference, folder / "target")
            config = json.loads((folder / "target" / "config.json").read_text())
            drafter = assistants.save(
                transformers, folder / "drafter", hf.GEMMA4["hidden_size"], assistants.CASES[head], scale=0.3
            )
            known[target, head] = reference, ours, drafter, folder / "drafter", config
        return known[target, head]

    return get


class PerRequest(Recorder):
    """Remembers proposals by request, then anchor."""

    def draft(self, rows):
        drafts = self._engine.draft(rows)
        for d in drafts:
            self.proposed.setdefault(d.request_id, {})[d.anchor] = d.token_ids
        return drafts


def drafted(model, folder, config, is_shifted=False, **options):
    """(engine, draft engine); shifted, each position of the one sequence gets the keys and values before it."""
    engine = make_engine(model, **options)
    described = detect(folder, config)
    install_fusion(engine.model, described, mx.float32)
    drafter = load_drafter(described, mx.float32, model.embedding_rows, model.uncapped_logits)
    if is_shifted:
        whole, width, before = drafter.extend_rows, described.hidden_size, [mx.zeros((1, described.feature_size))]

        def shifted(states, features, token_ids):
            joined = mx.concatenate([before.pop(), features])
            before.append(joined[-1:])
            whole(states, mx.concatenate([features[:, :width], joined[:-1, width:]], axis=-1), token_ids)

        drafter.extend_rows = shifted
    return engine, DraftEngine(drafter, needs_features=True)


def expect_same_drafts(got, expected, at_least):
    """At common anchors; how many tokens are asked for depends on the room left in a step."""
    common = got.keys() & expected.keys()
    assert len(common) >= at_least, "hardly anything was drafted"
    for anchor in common:
        n = min(len(got[anchor]), len(expected[anchor]))
        assert got[anchor][:n] == expected[anchor][:n]


@pytest.fixture
def pair(made, tmp_path):
    """Both engines over a target of its own: taps stay in a model for good."""

    def make(target="plain", head="whole head", **options):
        reference, _, drafter, folder, config = made(target, head)
        model = hf.save_and_load(reference, tmp_path / f"target{len(list(tmp_path.iterdir()))}")
        return (reference, drafter, *drafted(model, folder, config, **options))

    return make


def candidates(transformers, reference, drafter, tokens):
    """What transformers' candidate generator proposes after `tokens`, whose last one is the anchor."""
    import torch

    generator = _generator(transformers, drafter, reference)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        outputs = reference(ids[:, :-1], use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
        proposed, _ = generator.get_candidates(
            ids, {"attention_mask": torch.ones_like(ids)}, outputs, is_first_iteration=False, n_last_matches=0
        )
    return proposed[0, len(tokens) :].tolist()


def _generator(transformers, drafter, reference):
    from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

    drafter.generation_config.num_assistant_tokens = K
    limits = transformers.GenerationConfig(max_length=500)
    return SinglePositionMultiTokenCandidateGenerator(drafter, reference.get_input_embeddings(), limits)


@pytest.mark.parametrize("head", assistants.CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_candidates_of_several_rounds_equal_transformers(transformers, pair, target, head):
    """A prompt of one token and one beyond the window, whose text goes on for three more."""
    reference, drafter, engine, drafts = pair(target, head)
    for name, prompt in {"short": PROMPTS["r0"][:1], "long": make_prompts(1, hf.VOCAB, seed=4)["r0"][:11] * 2}.items():
        rig = EngineRig(engine, (recorder := Recorder(drafts)), k=K)
        text = prompt + rig.run({name: prompt}, NUM_TOKENS)[name]
        full = {anchor: tokens for anchor, tokens in recorder.proposed.items() if len(tokens) == K}
        assert len(full) >= 4, "hardly a round was drafted"
        for anchor, tokens in sorted(full.items())[:: max(1, len(full) // 6)]:
            assert tokens == candidates(transformers, reference, drafter, text[: anchor + 1])
        assert len({t for tokens in full.values() for t in tokens}) > 3, "drafts that tell nothing"
        drafts.reset()


@pytest.mark.parametrize(("target", "batch"), [("plain", 1), ("shared keys", 1), ("shared keys", 4), ("plain", 16)])
def test_the_greedy_text_stays_as_it_is(made, pair, target, batch):
    """Requests come and go; every prompt's text crosses the window."""
    prompts = dict(list(PROMPTS.items())[:batch])
    expected = EngineRig(make_engine(made(target)[1])).run(prompts, NUM_TOKENS)
    *_, engine, drafts = pair(target)
    rig = EngineRig(engine, drafts, k=K)
    assert rig.run(prompts, NUM_TOKENS, schedule=random.Random(batch)) == expected
    assert rig.counts(list(prompts))[0] >= batch * NUM_TOKENS / 4, "hardly anything was drafted"


def test_a_batch_drafts_for_each_row_what_it_drafts_alone(pair):
    *_, engine, drafts = pair()
    prompts = dict(list(PROMPTS.items())[:4])
    alone = {}
    for name, prompt in prompts.items():
        EngineRig(engine, (recorder := Recorder(drafts)), k=K).run({name: prompt}, NUM_TOKENS)
        alone[name] = recorder.proposed
        drafts.reset()
    EngineRig(engine, (recorder := PerRequest(drafts)), k=K).run(prompts, NUM_TOKENS)
    for name in prompts:
        expect_same_drafts(recorder.proposed[name], alone[name], at_least=4)


def test_keys_and_values_of_the_wrong_position_are_noticed(pair):
    def proposed(is_shifted):
        *_, engine, drafts = pair(is_shifted=is_shifted)
        rig = EngineRig(engine, (recorder := Recorder(drafts)), k=K)
        prompt = PROMPTS["r0"] + list(range(20))
        return rig.run({"a": prompt}, NUM_TOKENS)["a"], recorder.proposed

    text, right = proposed(False)
    same_text, shifted = proposed(True)
    assert same_text == text
    common = right.keys() & shifted.keys()
    assert len(common) >= 4
    assert sum(right[a] != shifted[a] for a in common) >= len(common) / 2


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_drafts_after_a_prefix_hit_are_those_without_one(pair, layout):
    *_, engine, drafts = pair(num_slots=4, block_size=4, layout=layout)
    rng = random.Random(3)
    shared = [rng.randrange(hf.VOCAB) for _ in range(22)]
    prompt = [*shared, *(rng.randrange(hf.VOCAB) for _ in range(9))]
    rig = EngineRig(engine, (cold := Recorder(drafts)), k=K, num_blocks=40)
    expected = rig.run({"cold": prompt}, NUM_TOKENS)["cold"]
    drafts.reset()
    rig = EngineRig(engine, (warm := Recorder(drafts)), k=K, num_blocks=40)
    rig.run({"other": [*shared, 1, 2, 3]}, 4)
    warm.proposed.clear()
    warm.num_rows = 0
    assert rig.run({"warm": prompt}, NUM_TOKENS)["warm"] == expected
    assert rig.outputs["warm"][-1].timings.num_cached_tokens == 20
    assert warm.proposed == cold.proposed
    assert len(warm.proposed) >= 4
    assert warm.num_rows >= len(prompt), "the restored positions' rows were not sent"


@pytest.mark.parametrize("layout", ["slots", "paged"])
@pytest.mark.parametrize("event", ["preempted", "preempted, blocks kept", "target lost"])
def test_what_interrupts_a_request_leaves_its_drafts_as_they_are(pair, event, layout):
    """In the third window of a text; then everything is computed again, or only what follows the cached blocks."""
    *_, engine, drafts = pair("shared keys", num_slots=4, block_size=4 if "kept" in event else None, layout=layout)
    prompts = {name: PROMPTS[name] for name in ("r0", "r1", "r2")}
    alone = {}
    for name, prompt in prompts.items():
        rig = EngineRig(engine, (recorder := Recorder(drafts)), k=K, num_blocks=60)
        alone[name] = rig.run({name: prompt}, NUM_TOKENS)[name], recorder.proposed
        drafts.reset()
    rig = EngineRig(engine, (recorder := PerRequest(drafts)), k=K, num_blocks=60)
    for name, prompt in prompts.items():
        rig.submit(name, prompt, NUM_TOKENS)
    while len(rig.tokens("r1")) < NUM_TOKENS // 2:
        assert rig.work(), "the moment was missed"
    recorder.proposed.clear()
    if event == "target lost":
        rig.lose_target()
        drafts.use_epoch(rig.epochs[rig.target])
    else:
        sequence = next(s for s in rig.core.running if s.submit.request_id == "r1")
        rig.core.session.preempt(sequence)
        rig._deliver(rig.core._finish(rig.now))
    rig.drain()
    for name, (text, undisturbed) in alone.items():
        assert rig.tokens(name) == text
        expect_same_drafts(recorder.proposed[name], undisturbed, at_least=2)
    timings = rig.outputs["r1"][-1].timings
    assert timings.num_preemptions == int(event != "target lost")


def test_a_quantised_assistant_drafts_nearly_the_same(made, tmp_path):
    *_, folder, config = made()
    told = quantize(folder, tmp_path / "small", 8, 32)
    assert told["num_quantized"] > 5
    drafters = [
        load_drafter(detect(f, config), mx.float32, mx.random.normal((hf.VOCAB, 64), key=mx.random.key(1)).__getitem__)
        for f in (folder, tmp_path / "small")
    ]
    rows = mx.random.normal((40, detect(folder, config).feature_size), key=mx.random.key(2))
    logits = []
    for drafter in drafters:
        state = drafter.new_state()
        drafter.extend([state], [rows], [[0] * 40])
        drafter.draft([state], [5], K, lambda row, step: logits.append(np.array(row[0])) or mx.array([step + 3]))
    plain, small = np.array(logits[:K]), np.array(logits[K:])
    difference = np.abs(plain - small).max()
    assert 0 < difference < 0.05 * np.ptp(plain)


def test_pieces_and_a_ring_that_went_round_leave_the_draft_as_it_is(made):
    """The sliding layer's rows lie in a ring: 300 rows at once, or a few at a time, or after a short truncation."""
    *_, folder, config = made()
    described = detect(folder, config)
    embed = mx.random.normal((hf.VOCAB, 64), key=mx.random.key(1)).__getitem__
    drafter = load_drafter(described, mx.float32, embed)
    rows = mx.random.normal((300, described.feature_size), key=mx.random.key(2))
    whole, pieces, cut = (drafter.new_state() for _ in range(3))
    drafter.extend([whole], [rows], [[0] * 300])
    for first in range(0, 300, 37):
        piece = rows[first : first + 37]
        drafter.extend([pieces], [piece], [[0] * piece.shape[0]])
    drafter.extend([cut], [mx.concatenate([rows[:290], rows[:20]])], [[0] * 310])
    assert drafter.truncate(cut, 290) == 290
    assert not drafter.can_draft(cut)
    drafter.extend([cut], [rows[290:]], [[0] * 10])
    states = [whole, pieces, cut]
    want, *others = drafter.draft(states, [7] * 3, K).token_ids.tolist()
    assert others == [want, want]
    assert drafter.draft([pieces], [7], K).token_ids.tolist() == [want]
    drafter.truncate(cut, 100)  # rows of the window before it are overwritten
    assert (cut.start, cut.num_rows) == (100, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "qwen3"}, "needs a Gemma 4 target"),
        ({"hidden_size": 128}, "for a target of width 64"),
        ({"num_key_value_heads": 1}, r"reads \(2, 16\)"),
        ({"layer_types": ["full_attention"] * 4}, "sliding and full"),
    ],
)
def test_a_target_that_it_was_not_made_for_is_refused(made, changes, reason):
    *_, folder, config = made()
    with pytest.raises(BadModel, match=reason):
        detect(folder, config | changes)
    with pytest.raises(BadModel, match="target's configuration"):
        detect(folder)
    assert detect(folder, config, kind="mtp").kind == "assistant"


def test_drafters_get_the_targets_embedding_and_head_without_its_scale_and_softcap(transformers, tmp_path):
    """They apply both themselves, as their checkpoints say: twice would be a wrong input and a flatter distribution."""
    reference = hf.text_model(transformers, "gemma4_text", hf.GEMMA4 | {"final_logit_softcapping": 2.0})
    reference.save_pretrained(tmp_path)
    target = load(ModelFiles(name="m", folder=tmp_path), "float32")
    embed, head = target_tables(target, DrafterConfig(kind="dflash", path=tmp_path, max_draft_tokens=1))
    rows = reference.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_allclose(np.array(embed(mx.arange(hf.VOCAB))), rows, rtol=0, atol=1e-6)
    hidden = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(np.array(head(mx.array(hidden))), hidden @ rows.T, rtol=0, atol=1e-4)
    assert np.abs(hidden @ rows.T).max() > 2.0, "a softcap would not show"
