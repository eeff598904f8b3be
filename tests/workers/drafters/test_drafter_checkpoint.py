"""What `detect` says about the checkpoint layouts that exist, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import tiny_checkpoints as tiny  # noqa: E402 - MLX may be missing

from shared.errors import BadModel  # noqa: E402 - after the check for MLX
from workers.drafters.checkpoint import detect  # noqa: E402 - needs MLX
from workers.drafters.registry import load_drafter, load_fusion, tables  # noqa: E402 - needs MLX

pytestmark = pytest.mark.mlx

SPECULATORS_BODY = {"num_hidden_layers": 2, **tiny.DIMENSIONS}


def rewrite(folder, change):
    config = json.loads((folder / "config.json").read_text())
    config = change(config) or config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_speculators(folder, kind, **extra):
    """The same weights under a Red Hat Speculators config."""
    config = {
        "architectures": ["SpeculatorModel"],
        "speculators_model_type": kind,
        "transformer_layer_config": SPECULATORS_BODY,
        **extra,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_dflash_calls_itself_qwen3_and_is_found_by_architecture(tmp_path):
    folder, _ = tiny.dflash(tmp_path)
    config = detect(folder)
    assert (config.kind, config.taps, config.block_size, config.max_draft_tokens) == ("dflash", (1, 3, 5), 5, 4)
    assert config.mask_token_id == 7
    assert not config.is_anchor_sampled


def test_dflash_is_found_by_its_section_alone(tmp_path):
    folder, _ = tiny.dflash(tmp_path)
    rewrite(folder, lambda c: c.pop("architectures") and None)
    assert detect(folder).kind == "dflash"


def test_model_prefix_is_dropped(tmp_path):
    folder, arrays = tiny.dflash(tmp_path)
    make = tiny.Maker()
    make.arrays = arrays
    make.write(folder, json.loads((folder / "config.json").read_text()), lambda n: "model." + n)
    config = detect(folder)
    embed, head = tables(mx.zeros((tiny.V, tiny.H)))
    assert load_drafter(config, mx.float32, embed, head).max_draft_tokens == 4


def test_eagle3_ids_count_the_layer_before_which_the_feature_is_taken(tmp_path):
    folder, _ = tiny.eagle3(tmp_path)
    config = detect(folder)
    assert (config.kind, config.taps) == ("eagle3", (1, 3, 5))


def test_eagle3_default_taps_come_from_the_targets_depth(tmp_path):
    folder, _ = tiny.eagle3(tmp_path, eagle_aux_hidden_state_layer_ids=None)
    with pytest.raises(BadModel, match="depth"):
        detect(folder)
    target = {"num_hidden_layers": 30, "hidden_size": tiny.H}
    assert detect(folder, target).taps == (1, 14, 26)


def test_speculators_forms_give_the_same_taps_as_the_original_ones(tmp_path):
    folder, _ = tiny.dflash(tmp_path / "block")
    as_speculators(folder, "dflash", aux_hidden_state_layer_ids=[2, 4, 6], mask_token_id=7, block_size=5)
    config = detect(folder)
    assert (config.kind, config.taps, config.max_draft_tokens) == ("dflash", (1, 3, 5), 4)
    folder, _ = tiny.eagle3(tmp_path / "eagle", rename_layer="layers.0.", own_head=True, draft_vocab_size=20)
    as_speculators(
        folder,
        "eagle3",
        eagle_aux_hidden_state_layer_ids=[2, 4, 6],
        draft_vocab_size=20,
        norm_before_residual=True,
        speculators_config={"proposal_methods": [{"speculative_tokens": 5}]},
    )
    config = detect(folder)
    assert (config.kind, config.taps, config.norm_before_residual) == ("eagle3", (1, 3, 5), True)
    assert (config.vocab_size, config.draft_vocab_size, config.has_own_head) == (tiny.V, 20, True)


@pytest.mark.parametrize(
    ("proposed", "said", "expected"), [(5, None, True), (4, True, False), (None, True, True), (None, None, False)]
)
def test_anchor_row_follows_the_number_of_proposed_tokens(tmp_path, proposed, said, expected):
    folder, _ = tiny.dflash(tmp_path, markov=True)
    extra = {} if said is None else {"sample_from_anchor": said}
    if proposed is not None:
        extra["speculators_config"] = {"proposal_methods": [{"speculative_tokens": proposed}]}
    as_speculators(folder, "dspark", aux_hidden_state_layer_ids=[2, 4, 6], mask_token_id=7, block_size=5, **extra)
    assert detect(folder).is_anchor_sampled is expected


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"is_causal": True, "dflash_config": {"causal": False}}, (True, True)),
        ({"dflash_config": {"causal": True}}, (True, True)),
        ({"dflash_config": {"causal_head": True}}, (True, True)),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}, (True, False)),
        ({}, (False, False)),
    ],
)
def test_causal_rule(tmp_path, extra, expected):
    folder, _ = tiny.dflash(tmp_path, **extra)
    assert detect(folder).causal_layers == expected


def test_gemma_target_scales_the_embedding(tmp_path):
    folder, _ = tiny.dflash(tmp_path, final_logit_softcapping=30.0)
    target = {"model_type": "gemma4_text", "hidden_size": tiny.H, "num_hidden_layers": 9}
    config = detect(folder, target)
    assert config.embedding_scale == pytest.approx(tiny.H**0.5)
    assert config.logit_softcap == 30.0


def test_mtp_is_found_by_tensors_inside_a_whole_model(tmp_path):
    folder, _ = tiny.mtp(tmp_path, beside_model=True)
    same, other = {"hidden_size": tiny.H, "num_hidden_layers": 4}, {"hidden_size": 2 * tiny.H}
    assert detect(folder, same).kind == "mtp"
    assert detect(folder, other).kind == "model", "a smaller model that happens to have a head of its own"
    assert detect(folder, kind="mtp").kind == "mtp"


def test_mlx_conversion_of_a_qwen_head_has_the_one_added(tmp_path):
    folder, _ = tiny.mtp(tmp_path, qwen=True, metadata={"format": "mlx"})
    assert not detect(folder).has_zero_centred_norms


def test_quantised_drafter_is_dequantised(tmp_path):
    folder, arrays = tiny.dflash(tmp_path / "plain")
    config = json.loads((folder / "config.json").read_text())
    make = tiny.Maker()
    make.arrays = {k: v for k, v in arrays.items() if not k.startswith("fc.")}
    weight = np.pad(arrays["fc.weight"], ((0, 0), (0, 0)))[:, :64]  # groups of 32 need a width of 64 here
    packed, scales, biases = (np.array(a) for a in mx.quantize(mx.array(weight), 32, 8))
    make.arrays |= {"fc.weight": packed, "fc.scales": scales, "fc.biases": biases}
    make.write(tmp_path / "packed", config | {"quantization": {"group_size": 32, "bits": 8}})
    from workers.drafters.tensors import load_arrays

    loaded = load_arrays(tmp_path / "packed", "dflash", mx.float32, {"group_size": 32, "bits": 8}, ("fc.",))
    np.testing.assert_allclose(np.array(loaded["fc.weight"]), weight, atol=0.05)
    assert set(loaded) == {"fc.weight"}
    with pytest.raises(BadModel, match="no `quantization`"):
        load_arrays(tmp_path / "packed", "dflash", mx.float32, None, ("fc.",))


def test_fusion_reads_only_its_own_tensors(tmp_path):
    folder, arrays = tiny.dflash(tmp_path)
    make = tiny.Maker()
    make.arrays = {k: v for k, v in arrays.items() if not k.startswith("layers.1.mlp")}
    make.write(folder, json.loads((folder / "config.json").read_text()))
    fusion = load_fusion(detect(folder), mx.float32)
    assert fusion([mx.ones((2, tiny.H))] * 3).shape == (2, tiny.H)
    with pytest.raises(ValueError, match="captured taps"):
        fusion([mx.ones((2, tiny.H))] * 2)
    embed, head = tables(mx.zeros((tiny.V, tiny.H)))
    with pytest.raises(BadModel, match=r"lacks the tensor layers\.1\.mlp"):
        load_drafter(detect(folder), mx.float32, embed, head)


# ---------------------------------------------------------------- refusals


def refuse(folder, match, **arguments):
    with pytest.raises(BadModel, match=match):
        detect(folder, **arguments)


def test_refusals_say_why(tmp_path):
    refuse(tmp_path, r"config\.json")
    folder, _ = tiny.dflash(tmp_path / "a", attention_sink_bias=True)
    refuse(folder, "attention_sink_bias")
    folder, _ = tiny.dflash(tmp_path / "b", dflash_config={"projector_type": "domino"})
    refuse(folder, "domino")
    folder, _ = tiny.dflash(tmp_path / "c", hidden_act="gelu")
    refuse(folder, "gelu")
    folder, _ = tiny.dflash(tmp_path / "d", dflash_config={"target_layer_ids": None})
    refuse(folder, "target layers")
    folder, _ = tiny.dflash(tmp_path / "e", layer_types=["sliding_attention"] * 2)
    refuse(folder, "sliding_window")
    folder, _ = tiny.dflash(tmp_path / "f", architectures=["DFlash2DraftModel"])
    refuse(folder, "DFlash 2")
    folder, _ = tiny.eagle3(tmp_path / "g", draft_vocab_size=20)
    refuse(folder, "d2t and lm_head")
    folder, _ = tiny.dflash(tmp_path / "h")
    refuse(folder, "not one of", kind="eagle2")
    refuse(folder, "the target has 4 blocks", target={"num_hidden_layers": 4, "hidden_size": tiny.H})
    refuse(folder, "fc takes", target={"num_hidden_layers": 8, "hidden_size": 2 * tiny.H})
    as_speculators(folder, "mlp_speculator")
    refuse(folder, "mlp_speculator")
    rewrite(folder, lambda c: {"model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"]})
    refuse(folder, "gemma4_assistant: the configuration has no text_config")
    rewrite(folder, lambda c: {"architectures": ["Unheard"]})
    refuse(folder, "Unheard")
    (folder / "model.safetensors").write_bytes(b"\x00\x01")
    refuse(folder, "cannot read")
    (folder / "model.safetensors").unlink()
    refuse(folder, "no .safetensors")


def test_experts_of_an_mtp_head_without_a_router_are_refused(tmp_path):
    folder, arrays = tiny.mtp(tmp_path)
    make = tiny.Maker()
    make.arrays = {"mtp." + k: v for k, v in arrays.items() if ".mlp." not in k}
    make.matrix("mtp.layers.0.mlp.experts.gate_up_proj", 4, 2 * tiny.FFN, tiny.H)
    make.write(folder, json.loads((folder / "config.json").read_text()))
    refuse(folder, r"layers\.0\.mlp\.up_proj")


def test_drafter_without_tables_needs_the_targets(tmp_path):
    folder, _ = tiny.eagle3(tmp_path)
    with pytest.raises(BadModel, match="embedding and head"):
        load_drafter(detect(folder), mx.float32)


@pytest.mark.parametrize(
    ("tensor", "config"),
    [
        ("fc_norm.0.weight", {}),
        ("fc_norm.weight", {"fc_norm": True}),
        ("midlayer.self_attn.q_norm.weight", {}),
        ("router.weight", {}),
        (None, {"fc_norm": True}),
        (None, {"norm_before_fc": True}),
    ],
)
def test_an_eagle3_checkpoint_whose_arithmetic_would_be_guessed_is_refused(tmp_path, tensor, config):
    folder, arrays = tiny.eagle3(tmp_path, **config)
    if tensor is not None:
        make = tiny.Maker()
        make.arrays = {k.replace("layers.0.", "midlayer."): v for k, v in arrays.items()}
        make.norm(tensor, tiny.H)
        make.write(folder, json.loads((folder / "config.json").read_text()))
    named = (tensor or next(iter(config))).split(".")[0]
    with pytest.raises(BadModel, match=named):
        detect(folder)
