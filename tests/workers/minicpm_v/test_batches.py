"""Text and image requests together, through the real scheduler core and engine: each as when it is alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from shared.messages import SamplingParams
from tests.support.engine_rig import ForcedDrafts, make_engine
from tests.support.layouts import EveryShape
from tests.support.media_rig import CLASSES, CountedDecodes, MediaRig, alone
from tests.workers.minicpm_v import hf
from workers.load import loader
from workers.models import mlxlm

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def pair(transformers, folder):
    return hf.make(transformers, folder, seed=7, scale=0.3)


@pytest.fixture(scope="module")
def made():
    mine = hf.processor()
    wide, tall = hf.picture(60, 40, 1), hf.picture(11, 29, 2)
    return {
        "text": hf.prompt(mine, "Hello"),
        "image": hf.prompt(mine, "See @now", [wide]),
        "two": hf.prompt(mine, "One @two\n@.", [tall, wide]),
        "same image again": hf.prompt(mine, "Again@", [wide]),
        "long text": hf.prompt(mine, "A text of more than one chunk of a prefill, and a half."),
    }


@pytest.fixture(scope="module")
def expected(pair, made):
    found = alone(pair[1], made)
    assert len({token for tokens in found.values() for token in tokens}) > 8, "texts that tell nothing"
    return found


@pytest.mark.parametrize("name", ["text", "two"])
def test_greedy_text_of_32_tokens_equals_transformers(pair, made, name):
    reference, model = pair
    asked = made[name]
    # transformers takes a placeholder among the output for an image or video without pixels.
    never = {hf.IMAGE: -100.0, hf.VIDEO: -100.0}
    rig = MediaRig(model)
    rig.submit(name, asked.tokens, 32, SamplingParams(temperature=0.0, logit_bias=never), media=asked.media)
    rig.drain()
    output = rig.tokens(name)
    logits = hf.hf_logits(reference, asked, output)[len(asked.tokens) - 1 : -1]
    logits[:, list(never)] -= 100
    assert logits.argmax(axis=-1).tolist() == output
    assert len(output) == 32 and len(set(output)) > 3, "a text that tells nothing"


def test_a_mixed_batch_gives_what_each_request_gives_alone(pair, made, expected):
    rig = MediaRig(pair[1])
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert any(len(step.decodes) > 1 for step in rig.steps), "rows decoded together"
    contents = {part.content_hash for asked in made.values() for part in asked.media}
    assert rig.engine.media.num_encoder_runs == len(contents), "slices of the same image are encoded once"
    assert all(len(step.encodes) <= 1 for step in rig.steps), "decode rows wait for one slice at most"


@pytest.fixture
def joined(pair, folder, monkeypatch):
    """The model as on a GPU: with joined products, and a rotation that kernels do."""
    monkeypatch.setattr(mlxlm, "is_cpu", lambda: False)
    found = loader.load(hf.ModelFiles(name="m", folder=folder), "float32").model
    assert any("in_proj" in layer.linear_attn for layer in found.model.layers if layer.is_linear)
    return found


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_kernels_and_joined_products_as_on_a_gpu_give_the_same(joined, made, expected, layout):
    assert joined.query_heads() == [4, 4]
    kernel = CountedDecodes()
    engine = make_engine(joined, classes=CLASSES, is_exact=False, layout=layout)
    engine.store.use_attention(EveryShape(kernel))
    rig = MediaRig(joined, engine)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert 0 < kernel.num_rotated == kernel.num_decodes


@pytest.mark.parametrize("how", ["preempted", "target lost"])
def test_an_end_in_the_middle_of_an_image_changes_nothing(pair, made, expected, how):
    rig = MediaRig(pair[1])
    rig.core.session.planner.max_prefill_tokens = 3
    rig.start(made, ["two", "text"])
    inside = {at for part in made["two"].media[2:] for at in range(part.start + 1, part.start + part.num_tokens)}
    while not any(chunk.start in inside for step in rig.steps for chunk in step.prefills):
        assert rig.work()
    rig.interrupt(how)
    rig.drain()
    assert {name: rig.tokens(name) for name in ("two", "text")} == {n: expected[n] for n in ("two", "text")}
    if how == "preempted":
        assert rig.outputs["two"][-1].timings.num_preemptions == 1


def test_a_cached_prefix_with_images_is_used_for_the_same_images_only(pair, made, expected):
    """Hits end where states of the recurrent layers were kept, here behind the images."""
    model, asked = pair[1], made["two"]
    other = hf.prompt(hf.processor(), "One @two\n@.", [hf.picture(11, 29, 9), hf.picture(60, 40, 1)])
    rig = MediaRig(model, block_size=4)
    rig.start(made, ["two"])
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("again", asked.tokens, 12, media=asked.media)
    rig.submit("other", other.tokens, 12, media=other.media)
    rig.drain()
    assert rig.tokens("again") == expected["two"]
    assert rig.outputs["again"][-1].timings.num_cached_tokens >= asked.media[-1].start
    assert rig.outputs["other"][-1].timings.num_cached_tokens <= asked.media[0].start
    assert rig.tokens("other") == alone(model, {"other": other})["other"]
    assert rig.engine.media.num_encoder_runs == runs + 1, "the images of the hit need no encoder"


def test_drafts_behind_images_change_nothing(pair, made, expected):
    """Accepted and rejected ones; the recurrent layers go back by their trails."""
    model = pair[1]
    assert model.rewinds
    truth = {name: made[name].tokens + expected[name] for name in made}
    chances = {name: (0.0, 0.5, 0.9)[i % 3] for i, name in enumerate(made)}
    rig = MediaRig(model, drafter=ForcedDrafts(truth, chances), k=3)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    counts = [rig.counts([name]) for name in made if made[name].media]
    assert sum(accepted for _, accepted in counts) > 5
    assert sum(drafted - accepted for drafted, accepted in counts) > 5


def test_hidden_rows_are_seen_behind_an_image(pair, made):
    """By drafters and embeddings: rows after the final norm, which the head makes logits of."""
    reference, model = pair
    engine = make_engine(model, classes=CLASSES)
    assert engine.model.shows_hidden
    rig = MediaRig(model, engine)
    rig.submit("image", made["image"].tokens, 1, media=made["image"].media)
    seen = []
    while rig.queue:
        rig.work()
        if rig.engine.model._final is not None:
            seen.append(np.array(rig.engine.model.final_rows()))
    got = np.array(model.logits(mx.array(seen[-1])))
    np.testing.assert_allclose(got[-1], hf.hf_logits(reference, made["image"])[-1], rtol=0, atol=2e-4)
    assert seen[-1].shape[-1] == hf.HIDDEN
