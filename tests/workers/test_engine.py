"""The engine under random joins, leaves, chunks and drafts, against forwards over the whole text without a cache."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random

import mlx.core as mx
import numpy as np
import pytest

from shared.messages import SamplingParams, SequenceStart, Step, StepRow
from tests.support.engine_rig import VOCAB, WINDOW, EngineRig, decoder_target, make_engine, make_prompts, mlx_lm_target
from tests.support.layouts import ALL_LAYOUTS, PAGES
from workers.cache.paged import PagedStore
from workers.sampling.sampler import SampledRow, SlotSampling, sample

pytestmark = pytest.mark.mlx

NUM_TOKENS = 20
MAX_CHUNK = 15
PROMPTS = list(make_prompts(10, seed=3).values())
SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=5, num_logprobs=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.6, num_logprobs=1),
    SamplingParams(temperature=0.9, seed=6, top_k=8, top_p=0.9, presence_penalty=0.5, logit_bias={4: 2.0}),
)


def uncached(model, prompt, params):
    """Tokens and, where wanted, their log-probabilities."""
    text, logprobs = list(prompt), []
    for _ in range(NUM_TOKENS):
        logits = model(mx.array([text]))[0, -1:]
        row = SampledRow(SlotSampling.start(params, VOCAB, text, len(prompt)), len(text))
        drawn = sample(logits, [row])
        text.append(drawn.tokens.item())
        logprobs += drawn.read_logprobs([row]).values()
    return text[len(prompt) :], logprobs


@pytest.fixture(scope="module")
def reference():
    model = decoder_target(num_layers=4, window=WINDOW)
    chosen = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(len(PROMPTS))]
    return model, chosen, [uncached(model, p, s) for p, s in zip(PROMPTS, chosen, strict=True)]


class Play:
    """Random steps for requests on `num_slots` slots; every choice comes from `random`."""

    def __init__(self, engine, chosen, truths, seed, num_slots=5):
        self.engine, self.chosen, self.truths = engine, chosen, truths
        self.random = random.Random(seed)
        self.free = list(range(num_slots))
        self.waiting = list(range(len(PROMPTS)))
        self.owner, self.texts, self.done, self.capacity, self.on_device = {}, {}, {}, {}, {}
        self.logprobs = {i: [] for i in self.waiting}
        self.classes_seen = set()

    def join(self):
        i, slot = self.waiting.pop(0), self.free.pop(self.random.randrange(len(self.free)))
        self.owner[slot], self.texts[slot], self.done[slot], self.capacity[slot] = i, list(PROMPTS[i]), 0, 1
        return SequenceStart(
            slot=slot, request_id=str(i), sampling=self.chosen[i], num_prompt_tokens=len(PROMPTS[i]),
            token_ids=PROMPTS[i],
        )  # fmt: skip

    def row(self, slot, start, token_ids, **more):
        self.capacity[slot] = max(self.capacity[slot], start + (len(token_ids) if token_ids else 1))
        return StepRow(slot=slot, start=start, capacity=self.capacity[slot], token_ids=token_ids, **more)

    def step(self):
        starts, decodes, prefills = [], [], []
        if self.waiting and self.free and self.random.random() < 0.5:
            starts.append(self.join())
        for slot, i in self.owner.items():
            prompt, text = PROMPTS[i], self.texts[slot]
            if self.done[slot] < len(prompt):
                first, n = self.done[slot], self.random.randint(1, MAX_CHUNK)
                chunk = prompt[first : first + n]
                self.done[slot] += len(chunk)
                prefills.append(self.row(slot, first, chunk, is_sampled=self.done[slot] == len(prompt)))
            elif self.random.random() < 0.8:
                k = self.random.choice([0, 0, 1, 3, 6])
                if k == 0 and self.on_device[slot]:
                    decodes.append(self.row(slot, len(text) - 1, None))
                    continue
                output = len(text) - len(prompt)
                truth = self.truths[i][0][output : output + k]
                drafts = [t if self.random.random() < 0.7 else self.random.randrange(VOCAB) for t in truth]
                decodes.append(self.row(slot, len(text) - 1, [text[-1], *drafts], num_drafts=len(drafts)))
        if not decodes and not prefills:
            return
        result = self.engine.finish(
            self.engine.begin(Step(epoch=1, step_id=1, starts=starts, decodes=decodes, prefills=prefills))
        )
        self.engine.store.placement.check_integrity()
        drafted = {row.slot for row in decodes if row.num_drafts}
        self.classes_seen |= {self.engine.store.placement.where(slot)[0] for slot in self.owner}
        for row in result.rows:
            assert row.error is None
            self.texts[row.slot] += row.token_ids
            self.on_device[row.slot] = row.slot not in drafted
            i = self.owner[row.slot]
            self.logprobs[i] += row.logprobs or []
            if len(self.texts[row.slot]) >= len(PROMPTS[i]) + NUM_TOKENS:
                self.check(i, self.texts[row.slot][len(PROMPTS[i]) :])
                del self.owner[row.slot]
                self.free.append(row.slot)
                self.engine.release([row.slot])

    def check(self, i, tokens):
        expected, logprobs = self.truths[i]
        assert tokens[:NUM_TOKENS] == expected, f"request {i}"
        got = self.logprobs[i][: len(logprobs)]
        assert len(got) == len(logprobs)
        for a, b in zip(got, logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [t.token_id for t in a.top] == [t.token_id for t in b.top]


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(("seed", "layout"), [(1, "slots"), (2, "slots"), (3, "slots"), (1, "paged"), (2, PAGES)])
def test_random_schedules_give_what_a_forward_over_the_whole_text_gives(reference, is_exact, seed, layout):
    model, chosen, truths = reference
    engine = make_engine(model, 8, is_exact, classes=[16, 48, 128], max_width=16, layout=layout)
    play = Play(engine, chosen, truths, seed)
    for _ in range(5000):
        if not play.waiting and not play.owner:
            break
        play.step()
    assert not play.waiting, "the schedule does not end"
    assert not play.owner, "the schedule does not end"
    assert play.classes_seen == {0, 1, 2}, "no sequence moved up"
    assert not engine.store._lengths, "a slot is still held"
    if isinstance(engine.store, PagedStore):
        assert not any(tables.num_used for tables in engine.store.tables.values()), "a block is still held"


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_request_that_ends_in_nan_fails_alone_and_leaves_nothing_to_the_next_owner_of_its_slot(is_exact, layout):
    model = decoder_target(num_layers=2)
    prompts = {f"r{i}": [1 + i, 2, 3] for i in range(3)}
    expected = EngineRig(make_engine(model, 4, is_exact, layout=layout)).run(prompts, 6)
    weight = model.model.embed_tokens.weight
    weight[49] = float("nan")
    assert all(49 not in tokens for tokens in expected.values())
    engine = make_engine(model, 4, is_exact, layout=layout)
    rig = EngineRig(engine)
    rig.submit("bad", [49] * 8, 6)
    assert rig.run({"good": prompts["r0"]}, 6) == {"good": expected["r0"]}
    (last,) = rig.outputs["bad"]
    assert last.finish_reason == "error"
    assert "NaN" in (last.error or "")
    for name, prompt in prompts.items():
        rig.submit(name, prompt, 6)
    rig.drain()
    assert {name: rig.tokens(name) for name in prompts} == expected


@pytest.mark.parametrize("architecture", ["qwen3_next", "lfm2", "mamba2"])
def test_a_rejected_draft_leaves_the_recurrent_state_of_plain_decoding(architecture):
    """After the replay the state equals that of a slot that was never drafted for."""
    model = mlx_lm_target(architecture)
    prompt = [5, 9, 30, 2, 7]
    engine = make_engine(model, 2)
    text = prompt + EngineRig(engine).run({"a": prompt}, 12)["a"]
    engine.reset()
    starts = [
        SequenceStart(slot=s, request_id=str(s), sampling=SAMPLINGS[0], num_prompt_tokens=5, token_ids=prompt)
        for s in (0, 1)
    ]

    def run(starts, *rows):
        return engine.finish(engine.begin(Step(epoch=1, step_id=1, starts=starts, decodes=list(rows), prefills=[])))

    for slot in (0, 1):
        run(starts[slot : slot + 1], StepRow(slot=slot, start=0, capacity=32, token_ids=prompt))
    wrong = [(t + 1) % 50 for t in text]
    result = run(
        [], StepRow(slot=0, start=5, capacity=32, token_ids=[text[5], text[6], wrong[7], wrong[8]], num_drafts=3)
    )
    assert result.rows[0].token_ids == text[6:8]
    run([], StepRow(slot=0, start=7, capacity=32, token_ids=[text[7]]))
    for position in (5, 6, 7):
        run([], StepRow(slot=1, start=position, capacity=32, token_ids=[text[position]]))
    assert engine.store.recurrent_layers
    for layer in engine.store.recurrent_layers:
        (drafted, at), (plain, other) = layer.snapshot(0), layer.snapshot(1)
        for a, b in zip(drafted, plain, strict=True):
            np.testing.assert_allclose(np.array(a[at]), np.array(b[other]), atol=1e-4, rtol=1e-4)
