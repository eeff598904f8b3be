"""Writes tiny drafter folders with random weights, in the layouts that real checkpoints have."""

from __future__ import annotations

import json

import numpy as np
from safetensors.numpy import save_file

H, HEADS, KV_HEADS, HEAD_DIM, FFN, V, TAPS = 24, 4, 2, 8, 40, 50, 3
EPS, THETA = 1e-5, 10_000.0

DIMENSIONS = {
    "hidden_size": H,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": V,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "hidden_act": "silu",
}


class Maker:
    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.arrays: dict[str, np.ndarray] = {}

    def matrix(self, name, *shape):
        self.arrays[name] = (self.random.standard_normal(shape) / shape[-1] ** 0.5 * 1.5).astype(np.float32)

    def norm(self, name, size, centre=1.0):
        self.arrays[name] = (centre + 0.3 * self.random.standard_normal(size)).astype(np.float32)

    def layer(self, prefix, inputs=None, qk_norm=False, gated=False, centre=1.0):
        attention, inputs = prefix + "self_attn.", inputs or H
        self.matrix(attention + "q_proj.weight", HEADS * HEAD_DIM * (2 if gated else 1), inputs)
        self.matrix(attention + "k_proj.weight", KV_HEADS * HEAD_DIM, inputs)
        self.matrix(attention + "v_proj.weight", KV_HEADS * HEAD_DIM, inputs)
        self.matrix(attention + "o_proj.weight", H, HEADS * HEAD_DIM)
        if qk_norm:
            self.norm(attention + "q_norm.weight", HEAD_DIM, centre)
            self.norm(attention + "k_norm.weight", HEAD_DIM, centre)
        self.matrix(prefix + "mlp.gate_proj.weight", FFN, H)
        self.matrix(prefix + "mlp.up_proj.weight", FFN, H)
        self.matrix(prefix + "mlp.down_proj.weight", H, FFN)
        self.norm(prefix + "input_layernorm.weight", H, centre)
        self.norm(prefix + "post_attention_layernorm.weight", H, centre)

    def write(self, folder, config, rename=lambda name: name, metadata=None):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({rename(k): v for k, v in self.arrays.items()}, folder / "model.safetensors", metadata)
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def dflash(folder, num_layers=2, conv=False, selector=False, markov=False, block_size=5, dimensions=None, **extra):
    """The z-lab layout; `extra` goes to the top of the config, its `dflash_config` is merged."""
    make = Maker()
    make.matrix("fc.weight", H, TAPS * H)
    make.norm("hidden_norm.weight", H)
    make.norm("norm.weight", H)
    for i in range(num_layers):
        make.layer(f"layers.{i}.", qk_norm=True)
        for side in ("attention_conv", "mlp_conv") if conv else ():
            make.matrix(f"layers.{i}.{side}.base_kernel", 2, 2, H)
            make.matrix(f"layers.{i}.{side}.kernel_projection.weight", 2 * 2 * (H // 8), H)
    if selector:
        make.matrix("candidate_selector.predecessor_codebook", V, 6)
        make.matrix("candidate_selector.successor_codebook", V, 6)
        make.matrix("candidate_selector.hidden_projection.weight", 6, H)
    if markov:
        make.matrix("markov_head.markov_w1.weight", V, 6)
        make.matrix("markov_head.markov_w2.weight", V, 6)
        make.matrix("confidence_head.proj.weight", 1, H + 6)
        make.norm("confidence_head.proj.bias", 1)
    section = {"target_layer_ids": [1, 3, 5], "mask_token_id": 7, **extra.pop("dflash_config", {})}
    if conv:
        section |= {"conv_kernel_size": 2, "conv_group_size": 8}
    if selector:
        section |= {"selector_rank": 6, "selector_top_k": 4}
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": num_layers,
        "block_size": block_size,
        "dflash_config": section,
        **DIMENSIONS,
        **extra,
    }
    return make.write(folder, config), make.arrays


def eagle3(folder, draft_vocab_size=V, rename_layer="midlayer.", own_head=False, input_norm=False, **extra):
    """The original layout (`midlayer.`), or Speculators' (`layers.0.`)."""
    make = Maker()
    make.matrix("fc.weight", H, TAPS * H)
    make.norm("norm.weight", H)
    make.layer("layers.0.", inputs=2 * H)
    make.norm("layers.0.hidden_norm.weight", H)
    if input_norm:
        make.norm("input_norm.weight", TAPS * H)
    if own_head:
        make.matrix("lm_head.weight", draft_vocab_size, H)
    if draft_vocab_size != V:
        kept = np.sort(make.random.choice(V, draft_vocab_size, replace=False))
        make.arrays["d2t"] = (kept - np.arange(draft_vocab_size)).astype(np.int64)
        make.arrays["t2d"] = np.isin(np.arange(V), kept)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": [2, 4, 6],
        **DIMENSIONS,
        **extra,
    }
    return make.write(folder, config, lambda n: n.replace("layers.0.", rename_layer)), make.arrays


def mtp(folder, qwen=False, beside_model=False, metadata=None, **extra):
    """Plain, or the Qwen3.5 form: zero-centred norms, output gate, q/k norms, a quarter of each head rotated."""
    make, centre = Maker(), 0.0 if qwen else 1.0
    make.matrix("fc.weight", H, 2 * H)
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        make.norm(name + ".weight", H, centre)
    make.layer("layers.0.", qk_norm=qwen, gated=qwen, centre=centre)
    arrays = dict(make.arrays)
    make.arrays = {"mtp." + name: array for name, array in arrays.items()}
    if beside_model:
        make.matrix("model.embed_tokens.weight", V, H)
        make.layer("model.layers.0.")
    config = {"architectures": ["AnyForCausalLM"], "num_hidden_layers": 1, **DIMENSIONS, **extra}
    if qwen:
        config["partial_rotary_factor"] = 0.25
    return make.write(folder, config, metadata=metadata), arrays
