"""Text and image requests together, through the real scheduler core and engine: each as when it is alone."""

from __future__ import annotations

import mlx.core as mx
import pytest

from shared.messages import SamplingParams
from tests.support.engine_rig import make_engine
from tests.support.tiled_text import IMAGE, MODEL_TYPES
from tests.workers.idefics3 import hf
from tests.workers.qwen.test_batches import CLASSES, Counted, MediaRig, alone
from workers.kernels.choice import AttentionChoice, ShapeClass

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

MAX_TOKENS = 40  # a request still decodes when the tiles of all others are encoded, one a step


@pytest.fixture(scope="module", params=MODEL_TYPES)
def pair(request, transformers, tmp_path_factory):
    return hf.make(transformers, tmp_path_factory.mktemp(request.param), request.param, seed=7, scale=0.3)


@pytest.fixture(scope="module")
def made(pair):
    ours = hf.processor(pair[0])
    wide, tall = hf.picture(40, 13, 1), hf.picture(11, 29, 2)

    def prompt(text, *pictures):
        return hf.prompt(ours, "smolvlm", text, pictures)

    return {
        "text": prompt("Hello"),
        "image": prompt("See <image>now", wide),
        "two": prompt("One <image>two <image>.", wide, tall),
        "same image again": prompt("Again<image>", wide),
        "long text": prompt("A text of more than one chunk of a prefill, and a half."),
    }


@pytest.fixture(scope="module")
def expected(pair, made):
    return alone(pair[1], made, MAX_TOKENS)


def test_greedy_text_of_32_tokens_equals_transformers(pair, made):
    reference, model = pair
    for name in ("text", "two"):
        # transformers takes a placeholder among the output for an image without pixels.
        never = {IMAGE: -100.0}
        rig = MediaRig(model)
        rig.submit(
            name, made[name].tokens, 32, SamplingParams(temperature=0.0, logit_bias=never), media=made[name].media
        )
        rig.drain()
        output = rig.tokens(name)
        logits = hf.hf_logits(reference, made[name], output)[len(made[name].tokens) - 1 : -1]
        logits[:, IMAGE] -= 100
        assert logits.argmax(axis=-1).tolist() == output
        assert len(set(output)) > 3, "a text that tells nothing"


def test_a_mixed_batch_gives_what_each_request_gives_alone(pair, made, expected):
    model = pair[1]
    rig = MediaRig(model)
    rig.start(made, made, MAX_TOKENS)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert [step for step in rig.steps if len(step.decodes) > 3], "rows decoded together"
    tiles = {media.content_hash for prompt in made.values() for media in prompt.media}
    assert rig.engine.media.num_encoder_runs == len(tiles), "tiles of the same image are encoded once"
    assert all(len(step.encodes) <= 1 for step in rig.steps)


def test_attention_by_kernels_gives_the_same(pair, made, expected):
    """With joined products, as on a GPU."""
    model = pair[1]
    specs = model.layer_specs()
    used = {
        ShapeClass(heads, spec.num_kv_heads, spec.key_dim, rows, mx.float32): True
        for spec, heads in zip(specs, model.query_heads(), strict=True)
        for rows in range(17)
    }
    engine = make_engine(model, classes=CLASSES, is_exact=False)
    kernel = Counted()
    engine.store.use_attention(AttentionChoice(kernel, used))
    rig = MediaRig(model, engine)
    rig.start(made, made, MAX_TOKENS)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert kernel.num_decodes > len(specs)


def _until_inside_a_tile(rig, made):
    """A prefill chunk has ended in the middle of the second image."""
    rig.core.session.planner.max_prefill_tokens = 3
    rig.start(made, ["two"], MAX_TOKENS)
    media = made["two"].media[-4:]
    inside = {at for m in media for at in range(m.start + 1, m.start + m.num_tokens)}
    while not any(p.start in inside for s in rig.steps for p in s.prefills):
        assert rig.work()


def test_a_lost_target_in_the_middle_of_an_image_changes_nothing(pair, made, expected):
    rig = MediaRig(pair[1])
    _until_inside_a_tile(rig, made)
    rig.start(made, ["text"], MAX_TOKENS)
    rig.lose_target()
    rig.drain()
    assert {name: rig.tokens(name) for name in ("two", "text")} == {n: expected[n] for n in ("two", "text")}


def test_preemption_in_the_middle_of_an_image_changes_nothing(pair, made, expected):
    rig = MediaRig(pair[1])
    _until_inside_a_tile(rig, made)
    rig.core.session.preempt(rig.core.running[0])
    rig._deliver(rig.core._finish(rig.now))
    rig.drain()
    assert rig.tokens("two") == expected["two"]
    assert rig.outputs["two"][-1].timings.num_preemptions == 1


def test_a_cached_prefix_with_images_is_used_for_the_same_images_only(pair, made, expected):
    model = pair[1]
    other = hf.prompt(hf.processor(pair[0]), "smolvlm", "One <image>two", [hf.picture(40, 13, 9)])
    rig = MediaRig(model, block_size=4)
    rig.start(made, ["two"], MAX_TOKENS)
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("again", made["two"].tokens, MAX_TOKENS, media=made["two"].media)
    rig.submit("other", other.tokens, 12, media=other.media)
    rig.drain()
    assert rig.tokens("again") == expected["two"]
    assert rig.outputs["again"][-1].timings.num_cached_tokens > made["two"].media[3].start + 4
    assert rig.outputs["other"][-1].timings.num_cached_tokens < 8
    assert rig.tokens("other") == alone(model, {"other": other})["other"]
    assert rig.engine.media.num_encoder_runs == runs + len(other.media)
