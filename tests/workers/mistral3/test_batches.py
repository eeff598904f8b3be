"""Text and image requests together, through the real scheduler core and engine: each as when it is alone."""

from __future__ import annotations

import pytest

from shared.messages import SamplingParams
from tests.support.engine_rig import make_engine
from tests.support.layouts import EveryShape
from tests.support.media_rig import CLASSES, CountedDecodes, MediaRig, alone
from tests.workers.mistral3 import hf

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

MODELS = {
    "ministral3": ("mistral3", {**hf.MINISTRAL, "num_hidden_layers": 2}),
    "pixtral": ("llava", {"sliding_window": 24}),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, transformers, tmp_path_factory):
    model_type, text = MODELS[request.param]
    folder = tmp_path_factory.mktemp(model_type)
    reference, model = hf.make(transformers, folder, model_type, text, {"num_hidden_layers": 2}, seed=7, scale=0.3)
    return reference, model, hf.processor(folder)


def requests_of(made):
    wide, tall = hf.item(made, 40, 24, 1), hf.item(made, 8, 40, 2)
    return {
        "text": hf.prompt(made, [[5, 6, 7, 8, 9]]),
        "image": hf.prompt(made, [[5, 6], wide, [9, 10, 11]]),
        "two": hf.prompt(made, [[5, 6, 7], tall, [12, 13], wide, [14]]),
        "same image again": hf.prompt(made, [[30, 31], wide, [9]]),
        "image is last": hf.prompt(made, [[33], tall]),
        "long text": hf.prompt(made, [list(range(3, 60))]),
    }


@pytest.fixture(scope="module")
def expected(pair):
    return alone(pair[1], requests_of(pair[2]))


def test_greedy_text_of_32_tokens_equals_transformers(pair):
    reference, model, made = pair
    asked = requests_of(made)["two"]
    # transformers takes a placeholder among the output for an image without pixels.
    never = {hf.IMAGE: -100.0}
    rig = MediaRig(model)
    rig.submit("two", asked.tokens, 32, SamplingParams(temperature=0.0, logit_bias=never), media=asked.media)
    rig.drain()
    output = rig.tokens("two")
    logits = hf.hf_logits(reference, asked, output)[len(asked.tokens) - 1 : -1]
    logits[:, list(never)] -= 100
    assert logits.argmax(axis=-1).tolist() == output
    assert len(set(output)) > 3, "a text that tells nothing"


def test_a_mixed_batch_gives_what_each_request_gives_alone(pair, expected):
    _, model, made = pair
    asked = requests_of(made)
    rig = MediaRig(model)
    rig.start(asked, asked)
    rig.drain()
    assert {name: rig.tokens(name) for name in asked} == expected
    assert any(len(step.decodes) > 3 for step in rig.steps), "rows decoded together"
    assert rig.engine.media.num_encoder_runs == 2, "an image of several requests is encoded once"


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_kernels_and_joined_products_as_on_a_gpu_give_the_same(pair, expected, layout):
    """Queries are scaled before a kernel turns them."""
    _, model, made = pair
    kernel = CountedDecodes()
    engine = make_engine(model, classes=CLASSES, is_exact=False, layout=layout)
    engine.store.use_attention(EveryShape(kernel))
    asked = requests_of(made)
    rig = MediaRig(model, engine)
    attending = [layer.self_attn for layer in model.model.layers]
    for module in (model.language_model, *attending):
        module.is_cpu = False
    try:
        rig.start(asked, asked)
        rig.drain()
    finally:
        for module in (model.language_model, *attending):
            module.is_cpu = True
    assert {name: rig.tokens(name) for name in asked} == expected
    assert 0 < kernel.num_rotated <= kernel.num_decodes


@pytest.mark.parametrize("how", ["preempted", "target lost"])
def test_an_end_in_the_middle_of_an_image_changes_nothing(pair, expected, how):
    _, model, made = pair
    asked = requests_of(made)
    rig = MediaRig(model)
    rig.core.session.planner.max_prefill_tokens = 4
    rig.start(asked, ["two", "text"])
    item = asked["two"].media[1]
    while not any(item.start < p.start < item.start + item.num_tokens for s in rig.steps for p in s.prefills):
        assert rig.work()
    rig.interrupt(how)
    rig.drain()
    assert {name: rig.tokens(name) for name in ("two", "text")} == {n: expected[n] for n in ("two", "text")}
    if how == "preempted":
        assert rig.outputs["two"][-1].timings.num_preemptions == 1


def test_a_cached_prefix_is_used_for_the_same_image_only(pair, expected):
    _, model, made = pair
    asked = requests_of(made)
    other = hf.prompt(made, [[5, 6, 7], hf.item(made, 8, 40, 9), [12, 13, 14]])
    rig = MediaRig(model, block_size=4)
    rig.start(asked, ["two"])
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("again", asked["two"].tokens, 12, media=asked["two"].media)
    rig.submit("other", other.tokens, 12, media=other.media)
    rig.drain()
    assert rig.tokens("again") == expected["two"]
    assert rig.outputs["again"][-1].timings.num_cached_tokens > asked["two"].media[0].start + 4
    assert rig.outputs["other"][-1].timings.num_cached_tokens < 8
    assert rig.tokens("other") == alone(model, {"other": other})["other"]
    assert rig.engine.media.num_encoder_runs == runs + 1


def test_drafts_out_of_text_change_nothing_behind_images(pair):
    _, model, made = pair
    asked = {name: one for name, one in requests_of(made).items() if name != "long text"}
    few = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys((5, 6, 7), 100.0))  # so that texts repeat
    plain, drafted = MediaRig(model), MediaRig(model, k=3, ngram=True)
    for rig in (plain, drafted):
        for name in asked:
            rig.submit(name, asked[name].tokens, 24, few, media=asked[name].media)
        rig.drain()
    assert [drafted.tokens(name) for name in asked] == [plain.tokens(name) for name in asked]
    assert drafted.counts([name for name in asked if asked[name].media])[1] > 5
