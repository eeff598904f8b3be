"""MTP and DFlash drafters of Qwen3.5 behind images: the text is that of plain decoding, whatever interrupts it."""

from __future__ import annotations

import json

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.messages import DraftRow, FeatureRows, SamplingParams
from tests.support.engine_rig import make_engine
from tests.support.media_rig import CLASSES, MediaRig
from tests.workers.drafters import torch_reference
from tests.workers.qwen import hf
from tests.workers.test_speculation import Corrected
from workers.build_drafter import install_fusion
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

NUM_TOKENS = 16
BLOCK = 4
# A placeholder among the output would stand for an image without pixels.
GREEDY = SamplingParams(temperature=0.0, logit_bias={hf.IMAGE: -100.0, hf.VIDEO: -100.0})
HIDDEN, INNER, QUERIES, KEYS = 32, 48, 4 * 16, 2 * 16


def layer(name, gated):
    shapes = {
        "self_attn.q_proj": (QUERIES * (2 if gated else 1), HIDDEN), "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN), "self_attn.o_proj": (HIDDEN, QUERIES), "self_attn.q_norm": (16,),
        "self_attn.k_norm": (16,), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    return {f"{name}.{n}": shape for n, shape in shapes.items()}


def write_drafter(kind, folder):
    """One for the tiny Qwen3.5 of `hf`, with random weights."""
    config = {**hf.TEXT_HYBRID, "head_dim": 16}
    if kind == "mtp":
        norms = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.norm")
        shapes = {"mtp.fc": (HIDDEN, 2 * HIDDEN), **dict.fromkeys(norms, (HIDDEN,)), **layer("mtp.layers.0", True)}
    else:
        taps = {"target_layer_ids": [0, 3], "mask_token_id": 2}
        config |= {
            "architectures": ["DFlashDraftModel"],
            "num_hidden_layers": 2,
            "block_size": 5,
            "dflash_config": taps,
        }
        shapes = {"fc": (HIDDEN, 2 * HIDDEN), "hidden_norm": (HIDDEN,), "norm": (HIDDEN,)}
        shapes |= layer("layers.0", False) | layer("layers.1", False)
    make = np.random.default_rng(3)
    arrays = {
        f"{n}.weight": (make.standard_normal(s) * 0.3 + (len(s) == 1)).astype(np.float32) for n, s in shapes.items()
    }
    save_file(arrays, folder / "model.safetensors", {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def pair(transformers, tmp_path_factory):
    return hf.make(transformers, tmp_path_factory.mktemp("qwen3_5"), "qwen3_5", seed=7, scale=0.3)


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


def requests_of(model):
    config = model.config.vision
    wide, tall = (hf.item("image", hf.image(*size, 1)[None], config) for size in ((64, 40), (16, 56)))
    return {
        "image": hf.prompt([[5, 6], wide, [9, 10, 11]]),
        "two": hf.prompt([[5, 6, 7], tall, [12, 13], wide, [14]]),
        "text": hf.prompt([list(range(20, 40))]),
    }


@pytest.fixture(scope="module")
def expected(model):
    made = requests_of(model)
    rig = MediaRig(model)
    submit(rig, made)
    rig.drain()
    texts = {name: rig.tokens(name) for name in made}
    assert all(len(set(tokens)) > 3 for tokens in texts.values()), "texts that tell nothing"
    return texts


def submit(rig, made):
    for name, prompt in made.items():
        rig.submit(name, prompt.tokens, NUM_TOKENS, GREEDY, media=prompt.media)


@pytest.fixture(params=["mtp", "dflash"])
def drafted(request, model, expected, tmp_path):
    """A rig whose real drafter takes everything in and drafts; some of its tokens then give way to right ones."""
    config = detect(write_drafter(request.param, tmp_path), hf.TEXT_HYBRID)
    assert config.kind == request.param
    made = requests_of(model)
    truth = {name: made[name].tokens + tokens for name, tokens in expected.items()}
    truth |= {f"{name} again": tokens for name, tokens in truth.items()}
    engine = make_engine(model, classes=CLASSES, block_size=BLOCK)
    layers = list(model.model.language_model.model.layers)
    install_fusion(engine.model, config, mx.float32)
    drafts = DraftEngine(load_drafter(config, mx.float32, model.embed, model.logits), config.feature != "none")
    rig = MediaRig(model, engine, drafter=Corrected(drafts, truth, dict.fromkeys(truth, 0.6)), k=3, num_blocks=100)
    rig.core.session.planner.max_prefill_tokens = 8
    yield rig
    model.model.language_model.model.layers[:] = layers  # without the drafter's taps


def is_inside_an_image(rig, made):
    """Whether a prefill chunk of the last steps ended within an image of the request "two"."""
    return any(
        item.start < chunk.start < item.start + item.num_tokens
        for step in rig.steps[-2:]
        for chunk in step.prefills
        for item in made["two"].media[1:]
    )


def check(rig, made, expected, again=""):
    assert {name: rig.tokens(name + again) for name in made} == {name: expected[name] for name in made}
    for name in made:
        drafted, accepted = rig.counts([name + again])
        assert drafted > NUM_TOKENS / 4, f"hardly anything was drafted for {name}"
        assert 0 < accepted < drafted, "drafts are right and wrong"
    assert rig.drafter.num_drafted > NUM_TOKENS / 2, "the drafter itself could not draft"


def test_the_mtp_head_counts_positions_behind_images_as_transformers_does(pair, tmp_path):
    """Its pairs lie where the target's tokens do. Tokens of an image are embedded as placeholders."""
    import torch

    reference, model = pair
    made = requests_of(model)["two"]
    inputs = hf.hf_inputs(model, made)
    ids = torch.tensor([made.tokens])
    with torch.no_grad():
        hidden = reference.model(ids, use_cache=False, **inputs).last_hidden_state[0]
        places = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw")}
        axes = reference.model.get_rope_index(ids, **places)[0][:, 0]
    axes = torch.cat([axes, axes.max() + 1 + torch.arange(4).expand(3, 4)], dim=1)
    assert axes[0, -1] < len(made.tokens), "the images drew them together"
    folder = write_drafter("mtp", tmp_path)
    weights = {
        n.removeprefix("mtp."): torch.from_numpy(a).double() for n, a in load_file(folder / "model.safetensors").items()
    }
    dims = torch_reference.Dims(4, 2, 16, hf.TEXT["rms_norm_eps"], 10_000.0, 8, gated=True)
    embed, head = (
        m().weight.detach().double() for m in (reference.get_input_embeddings, reference.get_output_embeddings)
    )
    anchor = 33
    want = torch_reference.mtp(
        weights, dims, embed, head, hidden.double(), [*made.tokens, anchor], 4, lambda row: int(row.argmax()), axes=axes
    )
    drafter = load_drafter(detect(folder), mx.float32, model.embed, model.logits)
    state, logits = drafter.new_state(), []
    state.places = drafter.places(made.media)
    drafter.extend([state], [mx.array(hidden.numpy())], [made.tokens])
    drafter.draft([state], [anchor], 4, lambda rows, _step: logits.append(rows) or mx.argmax(rows, axis=-1))
    np.testing.assert_allclose(np.concatenate([np.array(rows) for rows in logits]), want, atol=1e-4, rtol=1e-4)
    # The same from what the scheduler and the target send.
    engine = DraftEngine(drafter, needs_features=True)
    media = [msgspec.structs.replace(item, tensors=[]) for item in made.media]
    row = DraftRow(request_id="r", start=0, token_ids=[*made.tokens, anchor], num_tokens=4, media=media)
    engine.take_tokens(row)
    engine.take_features(FeatureRows(request_id="r", start=0, num_rows=len(made.tokens)), hidden.numpy())
    assert engine.draft([row])[0].token_ids == want.argmax(-1).tolist()


def test_the_drafter_is_told_where_a_prompts_images_lie(drafted, model):
    made, rows = requests_of(model), []
    taken = drafted.drafter.take_tokens
    drafted.drafter.take_tokens = lambda row: rows.append(row) or taken(row)
    submit(drafted, made)
    drafted.drain()
    told = {row.request_id: row.media for row in rows if row.start == 0}
    assert {name: [(m.start, m.grid, m.tensors) for m in media] for name, media in told.items()} == {
        name: [(m.start, m.grid, []) for m in prompt.media] for name, prompt in made.items()
    }
    assert not any(row.media for row in rows if row.start), "once is enough"


def test_images_leave_the_text_as_it_is(drafted, model, expected):
    made = requests_of(model)
    submit(drafted, made)
    drafted.drain()
    check(drafted, made, expected)


def test_prefix_hits_with_images_leave_the_text_as_it_is(drafted, model, expected):
    made = requests_of(model)
    submit(drafted, made)
    drafted.drain()
    runs, before = drafted.engine.media.num_encoder_runs, drafted.drafter.num_drafted
    submit(drafted, {f"{name} again": prompt for name, prompt in made.items()})
    drafted.drain()
    check(drafted, made, expected, " again")
    assert drafted.drafter.num_drafted > before + NUM_TOKENS / 2, "features came with the cached prefixes"
    assert drafted.engine.media.num_encoder_runs == runs
    for name in made:
        cached = drafted.outputs[f"{name} again"][-1].timings.num_cached_tokens
        assert cached >= len(made[name].tokens) - 2 * BLOCK


@pytest.mark.parametrize("is_lost", [False, True], ids=["preempted", "target lost"])
@pytest.mark.parametrize("is_decoding", [False, True], ids=["in an image", "while it decodes"])
def test_what_interrupts_an_image_prompt_leaves_the_text_as_it_is(drafted, model, expected, is_decoding, is_lost):
    made = requests_of(model)
    submit(drafted, made)
    while not (len(drafted.tokens("two")) > 3 if is_decoding else is_inside_an_image(drafted, made)):
        assert drafted.work(), "the moment was missed"
    if is_lost:
        drafted.lose_target()
        drafted.drafter.inner.use_epoch(drafted.epochs[drafted.target])
    else:
        sequence = next(s for s in drafted.core.running if s.submit.request_id == "two")
        drafted.core.session.preempt(sequence)
        drafted._deliver(drafted.core._finish(drafted.now))
    drafted.drain()
    check(drafted, made, expected)
    if is_lost:
        assert drafted.engine.media.num_encoder_runs > 0, "another target saw the images again"
    else:
        assert drafted.outputs["two"][-1].timings.num_preemptions == 1
