"""Text, image and video requests together, through the real scheduler core and engine: each as when it is alone."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import msgspec
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.messages import SamplingParams
from tests.support.engine_rig import make_engine
from tests.support.layouts import EveryShape
from tests.support.media_oracle import our_logits
from tests.support.media_rig import CLASSES, MediaRig, alone
from tests.workers.qwen import hf
from workers.kernels.choice import AttentionChoice, ShapeClass
from workers.kernels.reference import ReferenceAttention
from workers.models.own import is_own
from workers.models.qwen import hybrid

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

MODEL_TYPES = list(hf.TEXTS)


@pytest.fixture(scope="module", params=MODEL_TYPES)
def pair(request, transformers, tmp_path_factory):
    seed = 10 if request.param == "qwen3_vl_moe" else 7  # with the other its texts repeat one token
    return hf.make(transformers, tmp_path_factory.mktemp(request.param), request.param, seed=seed, scale=0.3)


def requests_of(model):
    config = model.config.vision
    wide, tall = (hf.item("image", hf.image(*size, 1)[None], config) for size in ((64, 40), (16, 56)))
    frames = np.stack([hf.image(24, 24, s) for s in (3, 4)])
    return {
        "text": hf.prompt([[5, 6, 7, 8, 9]]),
        "image": hf.prompt([[5, 6], wide, [9, 10, 11]]),
        "two": hf.prompt([[5, 6, 7], tall, [12, 13], wide, [14]]),
        "same image again": hf.prompt([[30, 31], wide, [9]]),
        "image is last": hf.prompt([[33], tall]),
        "video": hf.prompt([[20, 21], hf.item("video", frames, config), [22]]),
        "long text": hf.prompt([list(range(3, 60))]),
    }


@pytest.fixture(scope="module")
def expected(pair):
    return alone(pair[1], requests_of(pair[1]))


def test_greedy_text_of_32_tokens_equals_transformers(pair):
    reference, model = pair
    made = requests_of(model)["two"]
    # transformers takes a placeholder among the output for an image without pixels.
    never = {hf.IMAGE: -100.0, hf.VIDEO: -100.0}
    rig = MediaRig(model)
    rig.submit("two", made.tokens, 32, SamplingParams(temperature=0.0, logit_bias=never), media=made.media)
    rig.drain()
    output = rig.tokens("two")
    logits = hf.hf_logits(reference, model, made, output)[len(made.tokens) - 1 : -1]
    logits[:, list(never)] -= 100
    assert logits.argmax(axis=-1).tolist() == output
    assert len(set(output)) > 3, "a text that tells nothing"


def test_a_mixed_batch_gives_what_each_request_gives_alone(pair, expected):
    model = pair[1]
    made = requests_of(model)
    rig = MediaRig(model)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    together = [step for step in rig.steps if len(step.decodes) > 3]
    assert together, "rows decoded together"


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_attention_by_kernels_gives_the_same_where_the_decoder_is_ours(pair, expected, layout):
    """Rows behind an image rotate by positions of their own, which a kernel does not know: they come rotated."""
    model = pair[1]
    if not is_own(model):
        pytest.skip("mlx-lm's decoder attends by stock operations")
    specs = model.layer_specs()
    assert len(model.query_heads()) == len(specs)
    used = {
        ShapeClass(heads, spec.num_kv_heads, spec.key_dim, rows, mx.float32): True
        for spec, heads in zip(specs, model.query_heads(), strict=True)
        for rows in range(17)
    }
    engine = make_engine(model, classes=CLASSES, is_exact=False, layout=layout)
    kernel = Counted()
    engine.store.use_attention(AttentionChoice(kernel, used))
    rig = MediaRig(model, engine)
    made = requests_of(model)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert kernel.num_decodes > len(specs)


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_a_hybrid_as_on_a_gpu_gives_the_same(transformers, tmp_path, layout):
    """Joined products, padded rows, attention by kernels, which rotate rows without media; with media, too."""
    _, model = hf.make(transformers, tmp_path, "qwen3_5", seed=7, scale=0.3)
    made = requests_of(model)
    expected = alone(model, made)
    hybrid.join(model.model)
    engine = make_engine(model, classes=CLASSES, is_exact=False, layout=layout)
    kernel = Counted()
    engine.store.use_attention(EveryShape(kernel))
    rig = MediaRig(model, engine)
    rig.start(made, made)
    rig.drain()
    assert {name: rig.tokens(name) for name in made} == expected
    assert kernel.num_decodes > 12 and 0 < kernel.num_rotated < kernel.num_decodes


class Counted(ReferenceAttention):
    num_decodes = num_rotated = 0

    def attend(self, q, *rest):
        self.num_decodes += q.shape[2] == 1
        self.num_rotated += rest[-1].rotation is not None
        return super().attend(q, *rest)


def test_decode_rows_wait_for_one_encoder_run_at_most(pair, expected):
    model = pair[1]
    made = requests_of(model)
    rig = MediaRig(model)
    rig.start(made, ["text"])
    while not rig.tokens("text"):
        rig.work()
    rig.start(made, ["two", "image"])
    rig.drain()
    encoding = [step for step in rig.steps if step.encodes]
    assert [len(step.encodes) for step in encoding] == [1, 1, 1]
    assert all(step.decodes and not step.prefills for step in encoding[:2])
    assert rig.tokens("text") == expected["text"]
    assert rig.engine.media.num_encoder_runs == 2, "the image of both is encoded once"


def test_a_lost_target_in_the_middle_of_an_image_changes_nothing(pair, expected):
    """Another target computes everything again, from the media that the scheduler kept."""
    model = pair[1]
    made = requests_of(model)
    rig = MediaRig(model)
    rig.core.session.planner.max_prefill_tokens = 8
    rig.start(made, ["two", "text"])
    item = made["two"].media[1]
    while not any(item.start < p.start < item.start + item.num_tokens for s in rig.steps for p in s.prefills):
        assert rig.work()
    rig.lose_target()
    rig.drain()
    assert {name: rig.tokens(name) for name in ("two", "text")} == {n: expected[n] for n in ("two", "text")}


def test_preemption_in_the_middle_of_an_image_changes_nothing(pair, expected):
    model = pair[1]
    made = requests_of(model)
    rig = MediaRig(model)
    rig.core.session.planner.max_prefill_tokens = 8
    rig.start(made, ["two"])
    item = made["two"].media[1]
    while not any(item.start < p.start < item.start + item.num_tokens for s in rig.steps for p in s.prefills):
        assert rig.work()
    rig.core.session.preempt(rig.core.running[0])
    rig._deliver(rig.core._finish(rig.now))
    rig.drain()
    assert rig.tokens("two") == expected["two"]
    assert rig.outputs["two"][-1].timings.num_preemptions == 1


def test_a_cached_prefix_with_images_is_used_for_the_same_images_only(pair, expected):
    model = pair[1]
    made = requests_of(model)
    config = model.config.vision
    other = hf.prompt([[5, 6, 7], hf.item("image", hf.image(16, 56, 9)[None], config), [12, 13], [14]])
    rig = MediaRig(model, block_size=4)
    rig.start(made, ["two"])
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("again", made["two"].tokens, 12, media=made["two"].media)
    rig.submit("other", other.tokens, 12, media=other.media)
    rig.drain()
    assert rig.tokens("again") == expected["two"]
    assert rig.outputs["again"][-1].timings.num_cached_tokens > made["two"].media[0].start + 4
    assert rig.outputs["other"][-1].timings.num_cached_tokens < 8
    assert rig.tokens("other") == alone(model, {"other": other})["other"]
    assert rig.engine.media.num_encoder_runs == runs + 1


def test_a_second_image_keeps_the_cached_prefix_before_it(pair):
    """A conversation that goes on with another picture."""
    model = pair[1]
    config = model.config.vision
    first, second = (hf.item("image", hf.image(*size, 3)[None], config) for size in ((64, 40), (16, 56)))
    turn = hf.prompt([[5, 6], first, [9, 10, 11, 12]])
    longer = hf.prompt([[5, 6], first, [9, 10, 11, 12, 13], second, [14]])
    wanted = alone(model, {"longer": longer})["longer"]
    rig = MediaRig(model, block_size=4)
    rig.submit("turn", turn.tokens, 12, media=turn.media)
    rig.drain()
    runs = rig.engine.media.num_encoder_runs
    rig.submit("longer", longer.tokens, 12, media=longer.media)
    rig.drain()
    assert rig.tokens("longer") == wanted
    assert rig.outputs["longer"][-1].timings.num_cached_tokens >= len(turn.tokens) - 4
    assert rig.engine.media.num_encoder_runs == runs + 1, "the image of the hit needs no encoder"


def test_drafts_out_of_text_change_nothing_behind_images(pair):
    """Verify rows of several tokens, whose positions lie apart from their places in the cache."""
    model = pair[1]
    made = {name: prompt for name, prompt in requests_of(model).items() if name != "long text"}
    few = SamplingParams(temperature=0.0, logit_bias=dict.fromkeys((5, 6, 7), 100.0))  # so that texts repeat
    plain, drafted = MediaRig(model), MediaRig(model, k=3, ngram=True)
    for rig in (plain, drafted):
        for name in made:
            rig.submit(name, made[name].tokens, 24, few, media=made[name].media)
        rig.drain()
    assert [drafted.tokens(name) for name in made] == [plain.tokens(name) for name in made]
    counts = [drafted.outputs[name][-1].timings for name in made if made[name].media]
    assert sum(c.num_accepted_tokens for c in counts) > 5
    assert sum(c.num_draft_tokens - c.num_accepted_tokens for c in counts) > 0, "nothing was rolled back"


def test_media_beside_the_prompt_or_of_a_kind_not_taken_are_refused(pair):
    model = pair[1]
    made = requests_of(model)["image"]
    for changes, words in (
        ({"start": 1000}, "outside the prompt"), ({"kind": "audio"}, "no audio"), ({"num_tokens": 0}, "outside"),
    ):  # fmt: skip
        rig = MediaRig(model)
        media = [msgspec.structs.replace(made.media[0], **changes)]
        with pytest.raises(AssertionError, match=words):
            rig.submit("bad", made.tokens, 4, media=media)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_5"])
def test_a_text_only_conversion_takes_text_only(transformers, tmp_path, model_type):
    from safetensors.numpy import load_file, save_file

    from shared.model_files import ModelFiles
    from workers.load import load

    _, model = hf.make(transformers, tmp_path, model_type)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in weights.items() if "visual" not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    assert (model.modalities, getattr(loaded, "modalities", [])) == (["image", "video"], [])
    made = hf.prompt([[5, 6, 7]])
    np.testing.assert_array_equal(our_logits(loaded, made), our_logits(model, made))


def _mlx_name(name):
    """Of a tensor in transformers' files, with one prefix for each version."""
    for prefix in ("model.visual.", "visual."):
        if name.startswith(prefix):
            return "vision_tower." + name.removeprefix(prefix)
    return "language_model." + name.replace("model.language_model.", "model.")


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_mlx_names_and_layout_of_the_newer_families_give_the_same(transformers, tmp_path, model_type, is_tied):
    from safetensors.numpy import load_file, save_file

    from shared.model_files import ModelFiles
    from workers.load import load

    _, model = hf.make(transformers, tmp_path, model_type, tie_word_embeddings=is_tied)
    weights = load_file(tmp_path / "model.safetensors")
    assert any(name.endswith("lm_head.weight") for name in weights) != is_tied
    save_file(
        {_mlx_name(n): w.transpose(0, 2, 3, 4, 1).copy() if w.ndim == 5 else w for n, w in weights.items()},
        tmp_path / "model.safetensors", {"format": "mlx"},
    )  # fmt: skip
    loaded = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    made = hf.prompt([[5, 6], hf.item("image", hf.image(24, 40)[None], model.config.vision), [7]])
    np.testing.assert_array_equal(our_logits(loaded, made), our_logits(model, made))


def _experts(weights, form):
    """The experts of transformers' files (E, outputs, inputs) in other forms."""
    made = {}
    for name, weight in weights.items():
        if ".experts." not in name:
            made[name] = weight
            continue
        base, part = name.split(".experts.")
        parts = {"gate_proj": weight[:, :24], "up_proj": weight[:, 24:]} if part == "gate_up_proj" else {part: weight}
        if form == "inputs first":
            made[name] = weight.swapaxes(1, 2).copy()
        elif form == "each expert":
            for n, a in parts.items():
                made |= {f"{base}.experts.{i}.{n}.weight": one.copy() for i, one in enumerate(a)}
        else:
            made |= {f"{base}.switch_mlp.{n}.weight": a.copy() for n, a in parts.items()}
    return made


@pytest.mark.parametrize("form", ["inputs first", "each expert", "split"])
def test_experts_in_every_form_of_checkpoints_give_the_same(transformers, tmp_path, form):
    import torch
    from safetensors.numpy import load_file, save_file

    from shared.model_files import ModelFiles
    from workers.load import load

    reference, model = hf.make(transformers, tmp_path, "qwen3_vl_moe", {"moe_intermediate_size": 24})
    weights = load_file(tmp_path / "model.safetensors")
    assert {w.shape for n, w in weights.items() if ".experts." in n} == {(4, 48, 32), (4, 32, 24)}
    save_file(_experts(weights, form), tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    made = hf.prompt([[5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(our_logits(loaded, made), our_logits(model, made))
    if form == "inputs first":  # as Qwen's own checkpoints are, which transformers turns
        read = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(read.parameters(), reference.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_experts_per_tok": 5}, "5 of 4 experts"),
        ({"num_experts": None}, "num_experts' is missing"),
        ({"moe_intermediate_size": "wide"}, "malformed configuration"),
    ],
)
def test_a_configuration_whose_experts_cannot_be_is_refused(changes, told):
    from shared.errors import BadModel
    from workers.models.qwen.config import QwenConfig

    text = {name: v for name, v in (hf.TEXTS["qwen3_vl_moe"] | changes).items() if v is not None}
    with pytest.raises(BadModel, match=told):
        QwenConfig.from_hf(
            {"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": hf.VISION["qwen3_vl"]}, 0
        )


@pytest.mark.parametrize("bits", [None, 8])
def test_a_checkpoint_in_mlx_layout_gives_the_same(transformers, tmp_path, bits):
    """MLX's names and convolution layout; 8 bits agree within the quantisation's error."""
    from safetensors.numpy import load_file, save_file

    from shared.model_files import ModelFiles
    from workers.load import load

    vision = {"embed_dim": 64, "num_heads": 4, "hidden_size": 64}
    _, model = hf.make(
        transformers, tmp_path, "qwen2_vl", {"hidden_size": 64, "intermediate_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 4, 2]}}, vision,
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, array in weights.items():
        name = name.replace("visual.", "vision_tower.") if name.startswith("visual.") else f"language_model.{name}"
        renamed[name] = array.transpose(0, 2, 3, 4, 1).copy() if array.ndim == 5 else array
    if bits is not None:
        for name in [n for n in renamed if n.startswith("language_model.") and n.endswith("proj.weight")]:
            packed, scales, biases = mx.quantize(mx.array(renamed[name]), group_size=32, bits=bits)
            base = name.removesuffix("weight")
            renamed |= {name: np.array(packed), base + "scales": np.array(scales), base + "biases": np.array(biases)}
        config["quantization"] = {"group_size": 32, "bits": bits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(renamed, tmp_path / "model.safetensors", {"format": "mlx"})
    loaded = load(ModelFiles(name="m", folder=tmp_path), "float32").model
    made = hf.prompt([[5, 6], hf.item("image", hf.image(24, 40)[None], model.config.vision), [7]])
    wanted, got = our_logits(model, made), our_logits(loaded, made)
    if bits is None:
        np.testing.assert_array_equal(got, wanted)
    else:
        assert 0 < np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_checkpoint_converted_to_8_bits_agrees_within_its_error(transformers, tmp_path, model_type):
    from safetensors.numpy import load_file

    from shared.model_files import ModelFiles
    from tandem.convert import convert
    from workers.load import load

    # Every token goes to every expert: where the two best were chosen, a small error would choose others.
    has_experts = model_type.endswith("_moe")
    text = {"hidden_size": 64} | ({"num_experts_per_tok": hf.MOE["num_experts"]} if has_experts else {})
    _, model = hf.make(transformers, tmp_path / "source", model_type, text, {"out_hidden_size": 64})
    convert(str(tmp_path / "source"), tmp_path / "packed", mode="affine", bits=8, group_size=32)
    names = load_file(tmp_path / "packed" / "model.safetensors")
    assert any(name.endswith("proj.scales") for name in names), "nothing was packed"
    if has_experts:
        packing = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization"]
        assert "language_model.model.layers.0.mlp.switch_mlp.down_proj.scales" not in names, "rows of 16"
        assert "language_model.model.layers.0.mlp.switch_mlp.gate_proj.scales" in names
        assert packing["language_model.model.layers.0.mlp.gate"] == {"group_size": 64, "bits": 8}
    loaded = load(ModelFiles(name="m", folder=tmp_path / "packed"), "float32").model
    made = hf.prompt([[5, 6], hf.item("image", hf.image(24, 40)[None], model.config.vision), [7]])
    modules = (m if isinstance(m, nn.Module) else m.model for m in (model, loaded))
    before, after = (dict(tree_flatten(module.parameters())) for module in modules)
    assert before.keys() == after.keys()
    for name, array in before.items():
        # Half a step of rounding, and half of a grid that MLX moves so that it holds the largest value exactly.
        step = float(array.max() - array.min()) / 255
        assert float(mx.abs(array - after[name]).max()) <= step + 1e-6, name
    wanted, got = our_logits(model, made), our_logits(loaded, made)
    assert 0 < np.abs(got - wanted).mean() < 0.05 * np.abs(wanted).mean()
