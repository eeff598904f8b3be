"""Loading: folders, quantised folders, GGUF, and what is refused."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import json
import struct

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama as mlx_llama
from mlx_lm.models import qwen2 as mlx_qwen2
from mlx_lm.models import qwen3 as mlx_qwen3

from shared.config import Settings
from shared.errors import BadModel
from shared.gguf_file import GgufTensor
from shared.model_files import ModelFiles, resolve
from tests.workers.tiny_architectures import BASE, RUNS, VOCAB, config_of
from workers.build import is_all_our_attention
from workers.load import load
from workers.load.gguf import load_gguf, read_tensor, unpermute

pytestmark = pytest.mark.mlx

LLAMA = {
    **BASE,
    "model_type": "llama",
    "hidden_size": 64,
    "head_dim": 16,
    "intermediate_size": 96,
    "eos_token_id": [2, 5],
}
del LLAMA["partial_rotary_factor"]
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
REFERENCES = {"llama": mlx_llama, "qwen2": mlx_qwen2, "qwen3": mlx_qwen3}


def reference(config, seed=0):
    """mlx-lm's model of a configuration, all parameters random."""
    mx.random.seed(seed)
    module = REFERENCES[config["model_type"]]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda a: a + 0.1 * mx.random.normal(a.shape), model.parameters()))
    mx.eval(model.parameters())
    return model


def save(folder, weights, config, shards=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    items = sorted(weights.items())
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), dict(items))
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(folder / name), dict(items[i::shards]))
        weight_map |= {key: name for key, _ in items[i::shards]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def weights_of(model):
    return dict(tree_flatten(model.parameters()))


def loaded_logits(folder, dtype="float32"):
    return load(ModelFiles(name="m", folder=folder), dtype).model(TOKENS)


def assert_close(a, b, atol=2e-5):
    np.testing.assert_allclose(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32)), rtol=0, atol=atol)


# ------------------------------------------------ folders


@pytest.mark.parametrize("model_type", REFERENCES)
@pytest.mark.parametrize("shards", [1, 3])
def test_folder_gives_mlx_lms_logits(tmp_path, model_type, shards):
    config = {**LLAMA, "model_type": model_type}
    model = reference(config)
    assert_close(loaded_logits(save(tmp_path / "m", weights_of(model), config, shards)), model(TOKENS))


def test_what_is_told_about_a_folder(tmp_path):
    folder = save(tmp_path / "m", weights_of(reference(LLAMA)), LLAMA)
    loaded = load(ModelFiles(name="served", folder=folder), "float32")
    assert (loaded.name, loaded.architecture, loaded.dtype) == ("served", "llama", "float32")
    assert (loaded.vocab_size, loaded.max_model_len, loaded.eos_token_ids) == (VOCAB, 256, [2, 5])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert load(ModelFiles(name="m", folder=folder), "float32").eos_token_ids == [7]


def test_yarn_stretches_the_context_length(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    folder = save(tmp_path / "m", weights_of(reference(LLAMA)), {**LLAMA, "rope_scaling": scaling})
    assert load(ModelFiles(name="m", folder=folder), "float32").max_model_len == 1024


def test_fingerprint_tells_weights_and_types_apart_but_not_places(tmp_path):
    def fingerprint(name, seed, dtype="float32"):
        folder = save(tmp_path / name, weights_of(reference(LLAMA, seed)), LLAMA)
        return load(ModelFiles(name=name, folder=folder), dtype).fingerprint

    first = fingerprint("a", 0)
    assert fingerprint("b", 0) == first
    assert fingerprint("c", 1) != first
    assert fingerprint("a", 0, "bfloat16") != first


def test_auto_is_float32_on_the_cpu_and_other_types_are_kept(tmp_path):
    weights = {k: v.astype(mx.bfloat16) for k, v in weights_of(reference(LLAMA)).items()}
    folder = save(tmp_path / "m", weights, LLAMA)
    if mx.default_device() == mx.Device(mx.cpu):
        assert load(ModelFiles(name="m", folder=folder), "auto").dtype == "float32"
    assert load(ModelFiles(name="m", folder=folder), "float16").dtype == "float16"
    assert_close(loaded_logits(folder, "bfloat16"), loaded_logits(folder, "float32"), atol=0.15)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_folder_gives_the_dequantised_models_logits(tmp_path, bits):
    model = reference(LLAMA)
    nn.quantize(model, group_size=32, bits=bits)
    config = {**LLAMA, "quantization": {"group_size": 32, "bits": bits}}
    folder = save(tmp_path / "m", weights_of(model), config)
    assert_close(loaded_logits(folder), model(TOKENS), atol=1e-4)


def test_other_architectures_load_through_mlx_lm(tmp_path):
    from workers.load.folder import mlx_lm_classes

    config = config_of("olmo2", RUNS["olmo2"])
    model_class, args_class = mlx_lm_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.eval(model.parameters())
    loaded = load(ModelFiles(name="m", folder=save(tmp_path / "m", weights_of(model), config)), "float32")
    assert loaded.architecture == "olmo2"
    assert_close(loaded.model(TOKENS), model(TOKENS))


# ------------------------------------------------ damaged and hostile folders


def refuse(folder, words):
    with pytest.raises(BadModel, match=words):
        load(ModelFiles(name="m", folder=folder), "float32")


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "m", weights_of(reference(LLAMA)), LLAMA)


def rewrite_config(folder, **changes):
    config = {**LLAMA, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite_weights(folder, change):
    weights = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def test_missing_tensor_is_named(folder):
    rewrite_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    refuse(folder, r"model\.layers\.1\.mlp\.up_proj\.weight")


def test_extra_tensor_is_named(folder):
    rewrite_weights(folder, lambda w: w.update({"model.layers.9.surprise": mx.zeros((2,))}))
    refuse(folder, r"model\.layers\.9\.surprise")


def test_mis_shaped_tensor_is_named(folder):
    rewrite_weights(folder, lambda w: w.update({"model.norm.weight": mx.zeros((3,))}))
    refuse(folder, r"model\.norm\.weight")


def test_truncated_file_is_refused_before_anything_is_allocated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuse(folder, "cut short")


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "X1", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"shape": [1]}},
        {"a": 3},
        [1, 2],
    ],
)
def test_lying_header_is_refused(folder, header):
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    refuse(folder, "malformed header")


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\xff" * 64])
def test_file_that_is_no_safetensors_is_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    refuse(folder, "not a safetensors file")


def test_missing_shard_is_named(tmp_path):
    folder = save(tmp_path / "m", weights_of(reference(LLAMA)), LLAMA, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, "model-00002-of-00003.safetensors")


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, "holds no model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nonesuch"}, "unknown model_type 'nonesuch'"),
        ({"model_type": "../x"}, "unknown model_type"),
        ({"model_type": None}, "names no model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "many"}, "malformed"),
        ({"num_key_value_heads": 3}, "heads"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "odd"}}, "rope type 'odd'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, "layer_types"),
        ({"layer_types": ["odd"] * 3, "sliding_window": 8}, "odd"),
        ({"model_file": "evil.py"}, "own code"),
    ],
)
def test_bad_configuration_is_named(folder, changes, words):
    rewrite_config(folder, **changes)
    refuse(folder, words)


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    rewrite_config(folder, model_file="evil.py", auto_map={"AutoModelForCausalLM": "evil.Model"})
    refuse(folder, "own code")
    with pytest.raises(BadModel, match="TRUST_REMOTE_CODE"):
        load(ModelFiles(name="m", folder=folder), "float32", trust_remote_code=True)
    assert not marker.exists()


# ------------------------------------------------ GGUF

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(values, num_heads):
    """What llama.cpp's converter does to a query or key projection of "llama"."""
    halves = values.reshape(num_heads, 2, values.shape[0] // num_heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def write_gguf(path, config, weights, kind, extra=None):
    """A file as llama.cpp writes it: matrices in `kind`, vectors in float32."""
    arch = config["model_type"]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_eos_token_id(2)
    for name, array in weights.items():
        values = np.array(array.astype(mx.float32))
        stem, suffix = name.rsplit(".", 1)
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = permute(
                values, config["num_attention_heads" if stem.endswith("q_proj") else "num_key_value_heads"]
            )
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            gguf_name = f"blk.{layer}.{GGUF_NAMES[part]}.{suffix}"
        else:
            gguf_name = f"{GGUF_NAMES[stem]}.{suffix}"
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_gguf_gives_the_logits_of_its_dequantised_weights(tmp_path, kind):
    model = reference(LLAMA)
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights_of(model), kind)
    rounded = {
        name: mx.array(gguf.quants.dequantize(gguf.quants.quantize(np.array(w), kind), kind)) if w.ndim > 1 else w
        for name, w in weights_of(model).items()
    }
    model.load_weights(list(rounded.items()))
    loaded = load(ModelFiles(name="m", gguf=path), "float32")
    assert_close(loaded.model(TOKENS), model(TOKENS), atol=1e-4)
    assert (loaded.architecture, loaded.eos_token_ids, loaded.max_model_len) == ("llama", [2], 256)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_gguf_of_qwen(tmp_path, model_type, is_tied):
    config = {**LLAMA, "model_type": model_type, "tie_word_embeddings": is_tied}
    model = reference(config)
    path = write_gguf(tmp_path / "m.gguf", config, weights_of(model), gguf.GGMLQuantizationType.F32)
    assert_close(load(ModelFiles(name="m", gguf=path), "float32").model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(("head_dim", "is_ours"), [(16, False), (64, True)])
def test_the_heads_of_a_gguf_file_are_known_before_it_is_loaded(tmp_path, head_dim, is_ours):
    config = {**LLAMA, "head_dim": head_dim}
    weights = weights_of(reference(config))
    path = write_gguf(tmp_path / "m.gguf", config, weights, gguf.GGMLQuantizationType.F32)
    assert is_all_our_attention(ModelFiles(name="m", gguf=path), Settings()) == is_ours


def test_gguf_rope_factors_are_llama3_scaling(tmp_path):
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = {**LLAMA, "rope_scaling": scaling}
    model = reference(config)
    plain = 10000.0 ** (np.arange(0, 16, 2) / 16)
    factors = (np.array(model.layers[0].self_attn.rope._freqs) / plain).astype(np.float32)
    assert factors.max() > 7
    path = write_gguf(
        tmp_path / "m.gguf", config, weights_of(model), gguf.GGMLQuantizationType.F32, {"rope_freqs.weight": factors}
    )
    assert_close(load(ModelFiles(name="m", gguf=path), "float32").model(TOKENS), model(TOKENS))


def test_unpermute_undoes_the_converters_order():
    values = np.arange(4 * 8 * 3).reshape(32, 3)
    np.testing.assert_array_equal(unpermute(permute(values, 4), 4), values)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_NL"])
def test_read_tensor_equals_the_gguf_packages_values(name):
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 64, (6, 2 * block_bytes), dtype=np.uint8)  # small bytes keep the float16 scales finite
    tensor = GgufTensor("t", (6, 2 * block), int(kind), 16)
    raw = np.concatenate([np.zeros(16, np.uint8), data.reshape(-1)])
    np.testing.assert_array_equal(read_tensor(raw, tensor), gguf.quants.dequantize(data, kind))


def test_damaged_gguf_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", LLAMA, weights_of(reference(LLAMA)), gguf.GGMLQuantizationType.F32)
    whole = path.read_bytes()
    for size in (0, 10, 30, 200, len(whole) // 2, len(whole) - 4):
        path.write_bytes(whole[:size])
        with pytest.raises(BadModel):
            load(ModelFiles(name="m", gguf=path), "float32")
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(BadModel, match="not a GGUF"):
        load(ModelFiles(name="m", gguf=path), "float32")


def test_gguf_tensors_must_fit_the_model(tmp_path):
    weights = weights_of(reference(LLAMA))
    del weights["model.layers.0.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "a.gguf", LLAMA, weights, gguf.GGMLQuantizationType.F32)
    with pytest.raises(BadModel, match=r"layers\.0\.mlp\.up_proj\.weight is missing"):
        load(ModelFiles(name="m", gguf=path), "float32")
    extra = {"blk.0.ssm_a.weight": np.zeros(4, np.float32)}
    path = write_gguf(tmp_path / "b.gguf", LLAMA, weights_of(reference(LLAMA)), gguf.GGMLQuantizationType.F32, extra)
    with pytest.raises(BadModel, match="ssm_a"):
        load(ModelFiles(name="m", gguf=path), "float32")


def test_unknown_gguf_architecture_is_named(tmp_path):
    config = {**LLAMA, "model_type": "starcoder"}
    path = write_gguf(tmp_path / "m.gguf", config, {}, gguf.GGMLQuantizationType.F32)
    with pytest.raises(BadModel, match="starcoder"):
        load(ModelFiles(name="m", gguf=path), "float32")


# ------------------------------------------------ the embedded model


@pytest.mark.embedded
def test_embedded_model_continues_sensibly_and_agrees_with_mlx_lm():
    from frontend.tokenizer import load as load_text

    try:
        files = resolve("default", Settings())
    except BadModel as error:
        pytest.skip(str(error))
    plain, config = load_gguf(files.gguf, 0)
    expected = mlx_llama.Model(mlx_llama.ModelArgs.from_dict(config))
    expected.load_weights([(name, w.astype(mx.float32)) for name, w in tree_flatten(plain.parameters())])
    model = load(files, "float32").model
    tokenizer = load_text(files).tokenizer
    ids = tokenizer.encode("The capital of France is", add_special_tokens=False).ids
    assert_close(model(mx.array([ids])), expected(mx.array([ids])), atol=1e-3)
    for _ in range(3):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    assert "Paris" in tokenizer.decode(ids)
