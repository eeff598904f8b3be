"""Text and image requests together, through the real scheduler core and engine: each as when it is alone."""

from __future__ import annotations

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from shared.messages import SamplingParams, Step
from tests.support.engine_rig import EngineRig, ForcedDrafts, make_engine
from tests.support.layouts import EveryShape
from tests.support.media_oracle import Prompt
from tests.workers.lfm2_vl import hf
from tests.workers.lfm2_vl.test_images import picture
from workers.features import Bits
from workers.kernels.reference import ReferenceAttention
from workers.models.lfm2_vl import attention

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

CLASSES = [48, 96, 192]
LENGTH = 12


@pytest.fixture(scope="module")
def pair(transformers, tmp_path_factory):
    return hf.make(transformers, tmp_path_factory.mktemp("model"), seed=7, scale=0.4)


def tiled(size, words=(3,)):
    """A picture in tiles, each behind a token that stands for its marker."""
    made = Prompt([], [])
    for i, part in enumerate(hf.processor().tiles(picture(*size))):
        made.tokens.append(40 + i)
        item = hf.item(part.arrays["pixels"])
        assert item.num_tokens == part.num_tokens
        made.media.append(msgspec.structs.replace(item, start=len(made.tokens)))
        made.tokens += [hf.IMAGE] * part.num_tokens
    made.tokens += words
    return made


def requests_of():
    wide, tall = hf.item(hf.image(32, 16, 1)), hf.item(hf.image(8, 40, 2))
    return {
        "text": hf.prompt([[5, 6, 7, 8, 9]]),
        "image": hf.prompt([[5, 6], wide, [9, 10, 11]]),
        "two": hf.prompt([[5, 6, 7], tall, [12, 13], wide, [14]]),
        "same image again": hf.prompt([[30, 31], wide, [9]]),
        "image is last": hf.prompt([[33], tall]),
        "tiles": tiled((60, 40)),
        "long text": hf.prompt([list(range(3, 60))]),
    }


class MediaRig(EngineRig):
    """Its target takes images; `steps` are all it was sent."""

    def __init__(self, model, drafter=None, block_size=None, engine=None, **more):
        self.steps = []
        super().__init__(engine or make_engine(model, classes=CLASSES, block_size=block_size), drafter, **more)

    def start(self, made, names, max_tokens=LENGTH, sampling=None):
        for name in names:
            more = {} if sampling is None else {"sampling": sampling}
            self.submit(name, made[name].tokens, max_tokens, media=made[name].media, **more)

    def work(self):
        if self.queue and isinstance(self.queue[0], Step):
            self.steps.append(self.queue[0])
        return super().work()

    def work_into(self, item):
        """Until a prefill chunk begins inside an item."""
        while not any(item.start < p.start < item.start + item.num_tokens for s in self.steps for p in s.prefills):
            assert self.work()


def alone(model, made):
    found = {}
    for name in made:
        rig = MediaRig(model)
        rig.start(made, [name])
        rig.drain()
        found[name] = rig.tokens(name)
        assert len(found[name]) == LENGTH
    return found


@pytest.fixture(scope="module")
def expected(pair):
    found = alone(pair[1], requests_of())
    assert len({t for tokens in found.values() for t in tokens}) > 8, "texts that tell nothing"
    return found


@pytest.mark.parametrize("name", ["two", "tiles"])
def test_greedy_text_of_32_tokens_equals_transformers(pair, name):
    reference, model = pair
    made = requests_of()[name]
    never = {hf.IMAGE: -100.0}  # transformers takes a placeholder among the output for an image without pixels
    rig = MediaRig(model)
    rig.submit(name, made.tokens, 32, SamplingParams(temperature=0.0, logit_bias=never), media=made.media)
    rig.drain()
    output = rig.tokens(name)
    logits = hf.hf_logits(reference, made, output)[len(made.tokens) - 1 : -1]
    logits[:, hf.IMAGE] -= 100
    assert logits.argmax(axis=-1).tolist() == output
    assert len(set(output)) > 3, "a text that tells nothing"


def test_a_mixed_batch_gives_what_each_request_gives_alone(pair, expected):
    made = requests_of()
    rig = MediaRig(pair[1])
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert any(len(step.decodes) > 3 for step in rig.steps), "rows decoded together"
    contents = {m.content_hash for prompt in made.values() for m in prompt.media}
    assert rig.engine.media.num_encoder_runs == len(contents), "equal content is encoded once"


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_attention_by_kernels_gives_the_same(pair, expected, layout, monkeypatch):
    """As on a GPU: kernels rotate, too."""
    monkeypatch.setattr(attention, "is_cpu", lambda: False)
    model = pair[1]
    assert model.query_heads() == [4, 4]
    engine = make_engine(model, classes=CLASSES, is_exact=False, layout=layout)
    kernel = Counted()
    engine.store.use_attention(EveryShape(kernel))
    made = requests_of()
    rig = MediaRig(model, engine=engine)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert kernel.num_decodes > LENGTH and kernel.num_rotated > LENGTH


class Counted(ReferenceAttention):
    num_decodes = num_rotated = 0

    def attend(self, q, *rest):
        self.num_decodes += q.shape[2] == 1
        self.num_rotated += rest[-1].rotation is not None
        return super().attend(q, *rest)


def test_decode_rows_wait_for_one_tile_at_most(pair, expected):
    made = requests_of()
    rig = MediaRig(pair[1])
    rig.start(made, ["text"])
    while not rig.tokens("text"):
        rig.work()
    rig.start(made, ["tiles"])
    rig.drain()
    encoding = [step for step in rig.steps if step.encodes]
    assert [len(step.encodes) for step in encoding] == [1] * len(made["tiles"].media)
    assert all(step.decodes and not step.prefills for step in encoding[:4])
    assert {name: rig.tokens(name) for name in ("text", "tiles")} == {n: expected[n] for n in ("text", "tiles")}


@pytest.mark.parametrize("name", ["two", "tiles"])
def test_a_lost_target_in_the_middle_of_an_image_changes_nothing(pair, expected, name):
    made = requests_of()
    rig = MediaRig(pair[1])
    rig.core.session.planner.max_prefill_tokens = 3
    rig.start(made, [name, "text"])
    rig.work_into(made[name].media[-1])
    rig.lose_target()
    rig.drain()
    assert {n: rig.tokens(n) for n in (name, "text")} == {n: expected[n] for n in (name, "text")}


@pytest.mark.parametrize("name", ["two", "tiles"])
def test_preemption_in_the_middle_of_an_image_changes_nothing(pair, expected, name):
    made = requests_of()
    rig = MediaRig(pair[1])
    rig.core.session.planner.max_prefill_tokens = 3
    rig.start(made, [name])
    rig.work_into(made[name].media[-1])
    rig.core.session.preempt(rig.core.running[0])
    rig._deliver(rig.core._finish(rig.now))
    rig.drain()
    assert rig.tokens(name) == expected[name]
    assert rig.outputs[name][-1].timings.num_preemptions == 1


def test_a_cached_prefix_with_images_is_used_for_the_same_images_only(pair, expected):
    """Hits end where a state of the convolutions was kept, here behind the images."""
    model = pair[1]
    made = requests_of()["two"]
    other = hf.prompt([[5, 6, 7], hf.item(hf.image(8, 40, 9)), [12, 13], hf.item(hf.image(32, 16, 1)), [14]])
    rig = MediaRig(model, block_size=4)
    rig.submit("two", made.tokens, LENGTH, media=made.media)
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("again", made.tokens, LENGTH, media=made.media)
    rig.submit("other", other.tokens, LENGTH, media=other.media)
    rig.drain()
    assert rig.tokens("again") == expected["two"]
    last = made.media[-1]
    assert rig.outputs["again"][-1].timings.num_cached_tokens >= last.start
    assert rig.outputs["other"][-1].timings.num_cached_tokens < 8
    assert rig.tokens("other") == alone(model, {"other": other})["other"]
    assert rig.engine.media.num_encoder_runs == runs + 1, "the images of the hit need no encoder"


def test_a_second_image_keeps_the_cached_prefix_before_it(pair):
    """A conversation that goes on with another picture."""
    model = pair[1]
    first, second = hf.item(hf.image(32, 16, 3)), hf.item(hf.image(8, 40, 3))
    turn = hf.prompt([[5, 6], first, [9, 10, 11, 12]])
    longer = hf.prompt([[5, 6], first, [9, 10, 11, 12, 13], second, [14]])
    wanted = alone(model, {"longer": longer})["longer"]
    rig = MediaRig(model, block_size=4)
    rig.submit("turn", turn.tokens, LENGTH, media=turn.media)
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("longer", longer.tokens, LENGTH, media=longer.media)
    rig.drain()
    assert rig.tokens("longer") == wanted
    assert rig.outputs["longer"][-1].timings.num_cached_tokens >= len(turn.tokens) - 4
    assert rig.engine.media.num_encoder_runs == runs + 1, "the image of the hit needs no encoder"


def test_drafts_behind_images_change_nothing(pair, expected):
    """Accepted and rejected ones; the convolutions' states are put back, and accepted tokens fed again."""
    made = requests_of()
    truth = {name: made[name].tokens + expected[name] for name in made}
    chances = {name: (0.0, 0.5, 0.9)[i % 3] for i, name in enumerate(made)}
    rig = MediaRig(pair[1], ForcedDrafts(truth, chances), k=3)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    counts = [rig.counts([name]) for name in made if made[name].media]
    assert sum(accepted for _, accepted in counts) > 5
    assert sum(drafted - accepted for drafted, accepted in counts) > 5


def test_hidden_rows_are_seen_behind_an_image(pair):
    """By drafters and embeddings: rows after the final norm, which the head makes logits of."""
    reference, model = pair
    engine = make_engine(model, classes=CLASSES)
    assert engine.model.shows_hidden
    made = requests_of()["image"]
    rig = MediaRig(model, engine=engine)
    rig.submit("image", made.tokens, 1, media=made.media)
    seen: list[Bits] = []
    while rig.queue:
        rig.work()
        if rig.engine.model._final is not None:
            seen.append(np.array(rig.engine.model.final_rows()))
    wanted = hf.hf_logits(reference, made)
    got = np.array(model.logits(mx.array(seen[-1])))
    np.testing.assert_allclose(got[-1], wanted[-1], rtol=0, atol=1e-4)
    assert seen[-1].shape[-1] == hf.HIDDEN
