"""Llama, Mistral, Ministral 3, Qwen2 and Qwen3 against transformers, and their parts against plain definitions."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.errors import BadModel
from shared.model_files import ModelFiles
from tests.support.cached_logits import cached_logits
from workers.cache.spec import AttentionSpec
from workers.load import load
from workers.models import decoder, fp8
from workers.models.base import SplitModel
from workers.models.fuse import fuse_linears
from workers.models.rope import rope_parameters

pytestmark = pytest.mark.mlx

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LATER = {"llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 8}  # queries grow from position 8 on
HALF = 8  # frequencies of a head of 16

CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama 3": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "llama yarn exact ramp": ("llama", {"rope_parameters": {
        **YARN, "truncate": False, "beta_fast": 16, "beta_slow": 2,
    }}),
    "llama yarn factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "llama longrope short": ("llama", {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128, "factor": 4.0,
        "short_factor": list(np.linspace(1.0, 1.5, HALF)), "long_factor": list(np.linspace(2.0, 4.0, HALF)),
    }}),
    "llama longrope long": ("llama", {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": list(np.linspace(1.0, 1.5, HALF)), "long_factor": list(np.linspace(2.0, 4.0, HALF)),
    }}),
    "mistral window": ("mistral", {"sliding_window": 8}),
    "mistral full": ("mistral", {"sliding_window": None}),
    "ministral 3": ("ministral3", {"head_dim": 16, "rope_parameters": {
        **YARN, **LATER, "mscale": 1.0, "mscale_all_dim": 1.0,
    }}),
    "ministral 3 window, tied": ("ministral3", {
        "head_dim": 32, "sliding_window": 8, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **LATER},
    }),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    "qwen2 window unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3 window": ("qwen3", {
        "head_dim": 32, "use_sliding_window": True, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def oracle(transformers, model_type, overrides):
    """transformers' model with every parameter random, norms and biases included."""
    import torch

    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **overrides})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    return model


def oracle_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens), use_cache=False).logits.float().numpy()


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    return load(ModelFiles(name="m", folder=folder), "float32").model


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(transformers, tmp_path, case):
    expected_model = oracle(transformers, *CASES[case])
    model = saved_and_loaded(expected_model, tmp_path)
    tokens = np.random.default_rng(1).integers(0, 96, (2, 40))
    expected = oracle_logits(expected_model, tokens)
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        cached_logits(model, tokens), expected, rtol=0, atol=1e-4, err_msg="chunked prefill, ragged decode"
    )


# ------------------------------------------------ parts


def tiny(**overrides):
    config = {**SHAPE, "model_type": "llama", "rope_theta": 10000.0, **overrides}
    mx.random.seed(5)
    model = decoder.Model(decoder.DecoderConfig.from_hf(config, 0))
    mx.eval(model.parameters())
    return model


def test_fusing_keeps_the_logits_and_drops_the_parts():
    model = tiny(attention_bias=True)
    tokens = mx.array([[5, 6, 7, 8]])
    before = model(tokens)
    size = sum(a.size for _, a in tree_flatten(model.parameters()))
    model.fuse()
    np.testing.assert_allclose(np.array(model(tokens)), np.array(before), rtol=0, atol=1e-5)
    assert sum(a.size for _, a in tree_flatten(model.parameters())) == size
    assert "q_proj" not in model.layers[0].self_attn


@pytest.mark.parametrize("overrides", [
    {"model_type": "llama"}, {"model_type": "llama", "mlp_bias": True},
    {"model_type": "ministral3", "rope_parameters": LATER},
], ids=["plain", "bias", "query scaling"])  # fmt: skip
def test_products_joined_as_on_a_gpu_keep_the_logits(overrides):
    """Without the attention kernel, whose part is joining q, k and v."""
    config = decoder.DecoderConfig.from_hf({**SHAPE, **overrides}, 128)
    model = decoder.Model(config)
    inputs = mx.random.randint(0, 96, (2, 17))
    expected = np.array(model(inputs))
    for layer in model.layers:
        layer.self_attn.is_cpu = layer.mlp.is_cpu = False
    model.is_cpu = False
    model.fuse()
    model.join_attention_inputs()
    names = {name for name, _ in tree_flatten(model.layers[0].parameters())}
    assert {"mlp.gate_up_proj.weight", "self_attn.qkv_proj.weight"} <= names
    assert not {"mlp.gate_proj.weight", "self_attn.q_proj.weight"} & names
    np.testing.assert_allclose(np.array(model(inputs)), expected, atol=2e-5)


def test_quantised_projections_fuse_where_they_are_packed_alike():
    mx.random.seed(1)
    a, b = nn.Linear(64, 32, bias=False), nn.Linear(64, 48, bias=False)
    x = mx.random.normal((3, 64))
    packed = [layer.to_quantized(group_size=32, bits=4) for layer in (a, b)]
    fused = fuse_linears(packed)
    assert fused is not None
    expected = mx.concatenate([layer(x) for layer in packed], axis=-1)
    np.testing.assert_allclose(np.array(fused(x)), np.array(expected), rtol=0, atol=1e-5)
    assert fuse_linears([packed[0], b.to_quantized(group_size=32, bits=8)]) is None
    assert fuse_linears([a, packed[1]]) is None
    assert fuse_linears([a, nn.Linear(64, 48, bias=True)]) is None


@pytest.mark.parametrize("copies", [1, 20], ids=["tanh", "own exponential"])
def test_swiglu_on_the_cpu_is_swiglu(copies):
    gate = mx.concatenate([mx.linspace(-30, 30, 601), mx.array([-1e4, 1e4, 0.0])])
    gate = mx.tile(gate, copies)
    up = mx.linspace(-2, 2, gate.size)
    expected = nn.silu(gate) * up
    np.testing.assert_allclose(np.array(decoder.swiglu_on_cpu(gate, up)), np.array(expected), rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("offset", [0, 91, [3, 200]])
def test_cpu_tables_rotate_as_the_kernel_does(rows, offset):
    model = tiny(rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    batch = 2
    x = mx.random.normal((batch, rows, 3, 16))
    where = mx.array(offset) if isinstance(offset, list) else offset
    by_table = model._rope.at(where, rows, batch, is_cpu=True)(x)
    by_kernel = model._rope.at(where, rows, batch, is_cpu=False)(x)
    np.testing.assert_allclose(np.array(by_table), np.array(by_kernel), rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 15, 16, 64])
def test_norm_equals_its_definition(rows):
    norm = decoder.Norm(48, 1e-5, is_cpu=True)
    norm.weight = mx.random.normal((48,))
    x = np.array(mx.random.normal((1, rows, 48)))
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.array(norm.weight)
    np.testing.assert_allclose(np.array(norm(mx.array(x))), expected, rtol=0, atol=1e-5)


def test_head_and_body_can_be_called_apart_and_embeddings_given():
    model = tiny()
    tokens = mx.array([[1, 2, 3], [4, 5, 6]])
    assert isinstance(model, SplitModel)
    whole = np.array(model(tokens))
    np.testing.assert_array_equal(np.array(model.logits(model.hidden(tokens))), whole)
    np.testing.assert_array_equal(np.array(model(tokens, input_embeddings=model.embed(tokens))), whole)


def test_layer_specs_tell_heads_and_windows():
    model = tiny(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
    assert model.layer_specs() == [AttentionSpec(2, 16, 16, window) for window in (8, None, 8, None)]


def test_length_dependent_rope_follows_what_is_served():
    config = {"max_position_embeddings": 128, "rope_scaling": {
        "rope_type": "longrope", "original_max_position_embeddings": 32, "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }}  # fmt: skip
    short, long = rope_parameters(config, 16, 32), rope_parameters(config, 16, 0)
    np.testing.assert_allclose(short.inv_freq, np.array(long.inv_freq) * 2)
    dynamic = {"max_position_embeddings": 128, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert rope_parameters(dynamic, 16, 128).inv_freq == rope_parameters({}, 16, 0).inv_freq
    assert rope_parameters(dynamic, 16, 256).inv_freq[-1] < rope_parameters(dynamic, 16, 128).inv_freq[-1]


@pytest.mark.parametrize("rope", [{}, {"llama_4_scaling_beta": 0.1}, {**LATER, "original_max_position_embeddings": 0}])
def test_ministral_3_without_its_scaling_of_queries_is_refused(rope):
    with pytest.raises(BadModel, match="ministral3"):
        decoder.DecoderConfig.from_hf({**SHAPE, "model_type": "ministral3", "rope_parameters": rope}, 0)


def test_matrices_of_8_bit_floats_with_a_scale_are_unpacked():
    """Every value of the format, with NaN left out, against PyTorch."""
    torch = pytest.importorskip("torch")
    values = np.array([i for i in range(256) if i & 127 != 127], np.uint8)
    stored = {
        "a.weight": mx.array(values), "a.weight_scale_inv": mx.array(0.37, mx.bfloat16),
        "a.activation_scale": mx.array(2.0), "norm.weight": mx.ones((3,)),
    }  # fmt: skip
    made = fp8.unpacked(stored)
    assert set(made) == {"a.weight", "norm.weight"} and made["a.weight"].dtype == mx.bfloat16
    plain = torch.tensor(values).view(torch.float8_e4m3fn).float() * torch.tensor(0.37, dtype=torch.bfloat16).float()
    np.testing.assert_array_equal(np.array(made["a.weight"].astype(mx.float32)), plain.bfloat16().float().numpy())
    with pytest.raises(BadModel, match=r"a\.weight.*\(2,\)"):
        fp8.unpacked(stored | {"a.weight_scale_inv": mx.ones((2,))})


def test_rope_factors_of_the_wrong_number_are_refused():
    config = {"rope_scaling": {
        "rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 4.0, "short_factor": [1.0],
        "long_factor": [1.0],
    }}  # fmt: skip
    with pytest.raises(BadModel, match="long_factor"):
        rope_parameters(config, 16, 128)
