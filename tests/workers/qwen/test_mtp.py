"""The MTP head of Qwen3.5 and Qwen3-Next checkpoints, in the files of the model itself or split off: what it drafts,
and that the text stays that of plain decoding.

transformers leaves the head out. Its hidden rows are fed to tests/workers/drafters/torch_reference.py instead.
"""

from __future__ import annotations

import json
import random

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared.config import Settings
from shared.errors import BadModel
from shared.messages import SamplingParams
from shared.model_files import ModelFiles
from tandem.cli import main
from tandem.convert import convert, split_mtp
from tests.support.engine_rig import EngineRig, make_engine
from tests.workers.drafters import torch_reference as reference
from tests.workers.qwen import hf
from tests.workers.test_prefix_drafters import Recorder
from workers.build_drafter import build_drafter, draft_config, install_fusion
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, tables
from workers.drafters.tensors import load_arrays
from workers.load import load

pytestmark = pytest.mark.mlx

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 67, 64, 4, 2, 16, 64
THETA, ROPE_DIMS, EPS = 10_000.0, 4, 1e-6
TEXT = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 4,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": EPS,
    "max_position_embeddings": 256, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "eos_token_id": 1, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": ROPE_DIMS / HEAD_DIM,
        "mrope_section": [1, 1, 0], "mrope_interleaved": True,
    },
}  # fmt: skip
EXPERTS, CHOSEN, EXPERT_INNER = 6, 2, 32
MOE = {
    "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": EXPERT_INNER,
    "shared_expert_intermediate_size": INNER,
}  # fmt: skip
NUM_TOKENS = 20
TOLERANCE = 1e-4


def head_arrays(experts=None):
    """Names and shapes of Qwen3.5's head; its norms are stored as factor less 1.

    Args:
        experts: None for an MLP, "fused" (Qwen3.5), "each" (Qwen3-Next, quantised Qwen3.5) or "split" (MLX).
    """
    make = np.random.default_rng(3)
    shapes = {
        "fc": (HIDDEN, 2 * HIDDEN), "layers.0.self_attn.q_proj": (2 * HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "layers.0.self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "layers.0.self_attn.q_norm": (HEAD_DIM,), "layers.0.self_attn.k_norm": (HEAD_DIM,),
        **{f"layers.0.mlp.{n}_proj": (INNER, HIDDEN) for n in ("gate", "up")},
        "layers.0.mlp.down_proj": (HIDDEN, INNER),
        **dict.fromkeys(("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), (HIDDEN,)),
        **{f"layers.0.{n}_layernorm": (HIDDEN,) for n in ("input", "post_attention")},
    }  # fmt: skip
    arrays = {f"mtp.{n}.weight": (make.standard_normal(s) * 0.2).astype(np.float32) for n, s in shapes.items()}
    if experts is None:
        return arrays
    mlp = "mtp.layers.0.mlp."
    shapes = {
        "gate.weight": (EXPERTS, HIDDEN), "experts.gate_up_proj": (EXPERTS, 2 * EXPERT_INNER, HIDDEN),
        "experts.down_proj": (EXPERTS, HIDDEN, EXPERT_INNER), "shared_expert_gate.weight": (1, HIDDEN),
        **{f"shared_expert.{n}_proj.weight": (INNER, HIDDEN) for n in ("gate", "up")},
        "shared_expert.down_proj.weight": (HIDDEN, INNER),
    }  # fmt: skip
    arrays = {n: a for n, a in arrays.items() if ".mlp." not in n}
    arrays |= {mlp + n: (make.standard_normal(s) * 0.2).astype(np.float32) for n, s in shapes.items()}
    if experts == "fused":
        return arrays
    gate, up = np.split(arrays.pop(mlp + "experts.gate_up_proj"), 2, axis=1)
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": arrays.pop(mlp + "experts.down_proj")}
    if experts == "split":
        return arrays | {f"{mlp}switch_mlp.{n}.weight": a.copy() for n, a in parts.items()}
    return arrays | {f"{mlp}experts.{i}.{n}.weight": one.copy() for n, a in parts.items() for i, one in enumerate(a)}


FORMS = {"tied": None, "untied": None, "qwen3_5_moe": "fused", "qwen3_next": "each"}  # of the head in `original`
WITH_IMAGES = ["tied", "untied", "qwen3_5_moe"]


def configuration(transformers, form):
    if form == "qwen3_next":
        return transformers.Qwen3NextConfig(**TEXT, **MOE)
    tied = {"tie_word_embeddings": form == "tied"}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": HIDDEN}
    make, text = transformers.Qwen3_5Config, TEXT | tied
    if form == "qwen3_5_moe":
        make, text = transformers.Qwen3_5MoeConfig, TEXT | tied | MOE
    return make(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, **tied)


@pytest.fixture(scope="module", params=FORMS)
def original(transformers, tmp_path_factory, request):
    """(folder as the hub has it, transformers' model, its head): images' tensors aside, the head in a second file."""
    import torch

    torch.manual_seed(0)
    config = configuration(transformers, request.param)
    is_text = request.param == "qwen3_next"
    model = (transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText).from_config(
        config
    )
    model = model.eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "visual" not in name:
                # Larger than an initialisation: a text that is not one token, norms that are not all 1.
                scale = 0.2 if weight.dim() > 1 else 0.3
                weight.add_(torch.randn_like(weight) * scale)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    if is_text:  # the hub's files are of transformers 4
        written = json.loads((folder / "config.json").read_text())
        written |= {"rope_theta": THETA, "partial_rotary_factor": ROPE_DIMS / HEAD_DIM, "full_attention_interval": 4}
        (folder / "config.json").write_text(json.dumps(written))
    head = head_arrays(FORMS[request.param])
    save_file(head, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    return folder, model, head


def prompts(n, seed=1):
    make = random.Random(seed)
    return {f"r{i}": [make.randrange(2, 60) for _ in range(make.randrange(5, 30))] for i in range(n)}


def loaded(folder):
    return load(ModelFiles(name="m", folder=folder), "float32")


def drafting_engine(target, drafter, **options):
    """The target with the head of the folder `drafter`, as the two processes make them."""
    engine = make_engine(target.model, **options)
    settings = Settings(draft_model=str(drafter), dtype="float32")
    config = draft_config(settings, target.config)
    assert config.kind == "mtp"
    install_fusion(engine.model, config, mx.float32)
    return engine, DraftEngine(load_drafter(config, mx.float32, target.model.embed, target.model.logits), True)


def test_logits_of_the_head_agree_with_pytorch_from_transformers_hidden_rows(original):
    import torch

    folder, model, head = original
    target, tokens = loaded(folder), prompts(1, seed=4)["r0"]
    *known, _anchor = tokens
    with torch.no_grad():
        theirs = model.model(input_ids=torch.tensor([known])).last_hidden_state[0]
    ours = target.model.hidden(mx.array([known]))[0]
    np.testing.assert_allclose(np.array(ours), theirs.numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    drafter = load_drafter(detect(folder, target.config), mx.float32, target.model.embed, target.model.logits)
    state, logits = drafter.new_state(), []
    drafter.extend([state], [ours], [known])
    drafter.draft([state], [tokens[-1]], 4, lambda rows, _step: logits.append(rows) or mx.argmax(rows, axis=-1))
    has_experts = any(".mlp.gate." in name for name in head)
    read = head_arrays("fused" if has_experts else None)
    weights = {n.removeprefix("mtp."): torch.from_numpy(a).double() for n, a in read.items()}
    dims = reference.Dims(HEADS, KV_HEADS, HEAD_DIM, EPS, THETA, ROPE_DIMS, zero_centred=True, gated=True)
    embed = model.get_input_embeddings().weight.detach().double()
    output = model.get_output_embeddings().weight.detach().double()
    want = reference.mtp(
        weights, dims, embed, output, theirs.double(), tokens, 4, lambda row: int(row.argmax()),
        num_chosen=CHOSEN if has_experts else 0,
    )  # fmt: skip
    np.testing.assert_allclose(np.concatenate([np.array(r) for r in logits]), want, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_text_is_that_of_plain_decoding_with_requests_that_come_and_go(original, batch):
    folder, *_ = original
    target, asked = loaded(folder), prompts(batch)
    expected = EngineRig(make_engine(target.model)).run(asked, NUM_TOKENS)
    assert len({t for tokens in expected.values() for t in tokens}) > 5, "a text that tells nothing"
    engine, drafts = drafting_engine(target, folder)
    rig = EngineRig(engine, drafts, k=3)
    assert rig.run(asked, NUM_TOKENS, schedule=random.Random(2)) == expected
    assert rig.counts(list(asked))[0] >= batch * NUM_TOKENS / 4, "hardly anything was drafted"


@pytest.mark.parametrize("is_preempted", [False, True])
@pytest.mark.parametrize("original", WITH_IMAGES, indirect=True)
def test_images_in_prompts_leave_the_text_that_of_plain_decoding(original, is_preempted):
    """The preempted request loses its place while it decodes, its drafter's state too."""
    folder, *_ = original
    target = loaded(folder)
    vision = target.model.config.vision
    first, second = (hf.item("image", hf.image(*size, 1)[None], vision) for size in ((96, 64), (32, 96)))
    asked = {
        "image": hf.prompt([[5, 6], first, [9, 10, 11]]),
        "two": hf.prompt([[7], second, [12, 13], first, [14]]),
        "text": hf.prompt([[20, 21, 22]]),
    }
    # A placeholder among the output would stand for an image without pixels.
    never = SamplingParams(temperature=0.0, logit_bias={60: -100.0, 61: -100.0})

    def texts(rig):
        rig.core.target.info = msgspec.structs.replace(rig.core.target.info, modalities=target.model.modalities)
        for name, made in asked.items():
            # Its placeholders, 90 to 93, lie outside this vocabulary.
            tokens = [t - 30 if t >= hf.IMAGE else t for t in made.tokens]
            rig.submit(name, tokens, NUM_TOKENS, never, media=made.media)
        if is_preempted:
            while not len(rig.tokens("two")) > 3:
                assert rig.work()
            sequence = next(s for s in rig.core.running if s.submit.request_id == "two")
            rig.core.session.preempt(sequence)
            rig._deliver(rig.core._finish(rig.now))
        rig.drain()
        return {name: rig.tokens(name) for name in asked}

    expected = texts(EngineRig(make_engine(target.model, classes=[64, 128])))
    assert len({t for tokens in expected.values() for t in tokens}) > 5, "a text that tells nothing"
    engine, drafts = drafting_engine(target, folder, classes=[64, 128])
    rig = EngineRig(engine, drafts, k=3)
    assert texts(rig) == expected
    assert engine.media.num_encoder_runs == 2
    drafted = {name: rig.counts([name])[0] for name in asked}
    assert min(drafted.values()) > NUM_TOKENS / 4, "hardly anything was drafted behind images"
    assert rig.outputs["two"][-1].timings.num_preemptions == int(is_preempted)


def test_a_prefix_hit_changes_neither_text_nor_drafts(original):
    folder, *_ = original
    make = random.Random(6)
    shared = [make.randrange(2, 60) for _ in range(22)]
    prompt = [*shared, *(make.randrange(2, 60) for _ in range(9))]
    engine, drafts = drafting_engine(loaded(folder), folder, num_slots=4, block_size=4)
    cold = Recorder(drafts)
    expected = EngineRig(engine, cold, k=3, num_blocks=40).run({"cold": prompt}, 8)["cold"]
    drafts.reset()
    rig = EngineRig(engine, (warm := Recorder(drafts)), k=3, num_blocks=40)
    rig.run({"first": prompt}, 8)
    warm.proposed.clear()
    assert rig.run({"warm": prompt}, 8)["warm"] == expected
    assert rig.outputs["warm"][-1].timings.num_cached_tokens > 0
    assert warm.proposed == cold.proposed
    assert len(warm.proposed) >= 2


def test_a_head_that_was_split_off_drafts_for_a_conversion_that_lost_it(original, tmp_path, capsys):
    folder, _, head = original
    convert(str(folder), tmp_path / "m8", bits=8)
    with pytest.raises(BadModel, match=r"m8 has no `mtp.\*` tensors: name the original"):
        split_mtp(str(tmp_path / "m8"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert main(["split-mtp", str(folder), str(tmp_path / "head")]) == 0
    assert str(tmp_path / "head") in capsys.readouterr().out
    stored = load_file(tmp_path / "head" / "model.safetensors")
    assert stored.keys() == head.keys()
    assert all(np.array_equal(stored[name], array) for name, array in head.items())
    target = loaded(tmp_path / "m8")
    whole, split = detect(folder, target.config), detect(tmp_path / "head", target.config)
    same = ("rope_dims", "rope_theta", "rms_norm_eps", "has_zero_centred_norms", "head_dim", "vocab_size", "feature")
    assert [getattr(whole, n) for n in same] == [getattr(split, n) for n in same]
    assert split.has_zero_centred_norms and split.rope_dims == ROPE_DIMS
    asked = prompts(3)
    expected = EngineRig(make_engine(target.model)).run(asked, NUM_TOKENS)
    engine, drafts = drafting_engine(target, tmp_path / "head")
    rig = EngineRig(engine, drafts, k=2)
    assert rig.run(asked, NUM_TOKENS) == expected
    assert rig.counts(list(asked))[0] > 0
    _, info = build_drafter(Settings(draft_model=str(tmp_path / "head"), dtype="float32"), target)
    assert info.draft_kind == "mtp"


def test_a_packed_head_keeps_its_packing(original, tmp_path):
    folder, *_ = original
    packed = tmp_path / "packed"
    packed.mkdir()
    arrays = {n: mx.array(a) for n, a in head_arrays().items()}
    name = "mtp.fc"
    arrays[name + ".weight"], arrays[name + ".scales"], arrays[name + ".biases"] = mx.quantize(
        arrays[name + ".weight"], 32, 8
    )
    mx.save_safetensors(str(packed / "model.safetensors"), arrays, {"format": "pt"})
    how = {"group_size": 32, "bits": 8}
    config = json.loads((folder / "config.json").read_text()) | {"quantization": how}
    (packed / "config.json").write_text(json.dumps(config))
    split_mtp(str(packed), tmp_path / "head")
    made = json.loads((tmp_path / "head" / "config.json").read_text())
    assert made["quantization"] == how
    fc = load_arrays(tmp_path / "head", "mtp", mx.float32, how)["fc.weight"]
    np.testing.assert_allclose(np.array(fc), head_arrays()["mtp.fc.weight"], atol=0.01)


def broken(arrays, how):
    """(arrays of a head with experts, changes of its configuration)"""
    match how:
        case "no router's choice":
            return arrays, {"num_experts_per_tok": 0}
        case "other weights":
            return arrays, {"norm_topk_prob": False}
        case _:
            return {n: a for n, a in arrays.items() if how not in n}, {}


@pytest.mark.parametrize(
    ("experts", "how", "told"),
    [
        ("fused", "experts.down_proj", r"lacks layers\.0\.mlp\.experts\.down_proj"),
        ("fused", "shared_expert_gate", r"lacks layers\.0\.mlp\.shared_expert_gate"),
        ("each", "experts.5.", r"lacks layers\.0\.mlp\.experts\.5\.gate_proj"),
        ("split", "switch_mlp.up_proj", r"lacks layers\.0\.mlp\.switch_mlp\.up_proj"),
        ("split", "mlp.", r"lacks layers\.0\.mlp\.up_proj"),
        ("fused", "no router's choice", "0 of 6 experts"),
        ("fused", "other weights", "norm_topk_prob false is not supported"),
    ],
)
def test_a_head_whose_experts_could_not_run_is_refused_before_anything_is_written(tmp_path, experts, how, told):
    source = tmp_path / "source"
    source.mkdir()
    arrays, changes = broken(head_arrays(experts), how)
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe", "text_config": TEXT | MOE | changes}))
    save_file(arrays, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModel, match=told):
        split_mtp(str(source), tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_experts_of_a_packed_head_are_read_as_they_were_packed(tmp_path):
    """MLX's form, its norms with the 1 added: the drafts of the same head in the original's."""
    embed, head = tables(mx.random.normal((VOCAB, HIDDEN), key=mx.random.key(1)))
    how = {"group_size": 32, "bits": 8}
    plain, packed = {}, {}
    for name, array in ((n, mx.array(a)) for n, a in head_arrays("split").items()):
        if name.endswith("_proj.weight"):
            stem = name.removesuffix("weight")
            parts = mx.quantize(array, **how)
            packed |= dict(zip((name, stem + "scales", stem + "biases"), parts, strict=True))
            plain[name] = mx.dequantize(*parts, **how)
        else:
            plain[name], packed[name] = array, array + 1 if array.ndim == 1 else array
    mlp = "mtp.layers.0.mlp."
    gate, up, down = (plain.pop(f"{mlp}switch_mlp.{n}_proj.weight") for n in ("gate", "up", "down"))
    plain |= {f"{mlp}experts.gate_up_proj": mx.concatenate([gate, up], axis=1), f"{mlp}experts.down_proj": down}
    folders = [tmp_path / "plain", tmp_path / "packed"]
    for folder, arrays, form in zip(folders, (plain, packed), ("pt", "mlx"), strict=True):
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": form})
    drafted = []
    for folder, more in zip(folders, ({}, {"quantization": how}), strict=True):
        (folder / "config.json").write_text(json.dumps({"text_config": TEXT | MOE, **more}))
        drafter = load_drafter(detect(folder), mx.float32, embed, head)
        state, logits = drafter.new_state(), []
        drafter.extend([state], [mx.random.normal((9, HIDDEN), key=mx.random.key(2))], [list(range(9))])
        drafter.draft([state], [9], 4, lambda rows, _, seen=logits: seen.append(rows) or mx.argmax(rows, axis=-1))
        drafted.append(np.concatenate([np.array(rows) for rows in logits]))
    np.testing.assert_allclose(drafted[1], drafted[0], rtol=TOLERANCE, atol=TOLERANCE)
