"""Adapted models against PEFT's on transformers' models, and against mlx-lm's."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import numpy as np
import pytest

from shared.model_files import ModelFiles
from tests.support import tiny_model
from tests.support.tiny_adapter import write_mlx
from tests.workers.gemma import hf as gemma
from tests.workers.qwen import hf as qwen
from tests.workers.test_models_decoder import oracle
from workers.load import load
from workers.load.loader import LoadedModel

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.oracle,
    # PEFT 0.21 uses a name that transformers 5.23 will drop.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOKENS = np.random.default_rng(1).integers(3, 80, (2, 20))
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPLIT = {"layer_types": gemma.KINDS, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}


@pytest.fixture(scope="module")
def peft(transformers):
    return pytest.importorskip("peft")


def with_adapter(peft, model, folder, targets, **config):
    """PEFT's model, whose weights were drawn, with its adapter in `folder`/adapter and the base in `folder`/base."""
    import torch

    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **config))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    adapted.save_pretrained(folder / "adapter")
    return adapted.eval()


def loaded(folder, *, base="base", **adapters) -> LoadedModel:
    places = {name: str(folder / place) for name, place in adapters.items()}
    return load(ModelFiles(name="m", folder=folder / base), "float32", adapter_places=places)


def logits(ours: LoadedModel, name: str, tokens=TOKENS) -> np.ndarray:
    assert ours.adapters is not None
    ours.adapters.select([name] * len(tokens))
    return np.array(ours.model(mx.array(tokens)))


def hf_logits(model, tokens=TOKENS) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(tokens), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2}, "alpha_pattern": {"up_proj": 1.5}},
        {"layers_to_transform": [0, 2]},
    ],
    ids=["plain", "rank-stabilised", "patterns", "some layers"],
)
def test_logits_are_those_of_peft(transformers, peft, tmp_path, config):
    expected = with_adapter(peft, oracle(transformers, "llama", {}), tmp_path, PROJECTIONS, **config)
    ours = loaded(tmp_path, lora="adapter")
    np.testing.assert_allclose(logits(ours, "lora"), hf_logits(expected), rtol=0, atol=1e-4)
    with expected.disable_adapter():
        plain = hf_logits(expected)
    np.testing.assert_allclose(logits(ours, ""), plain, rtol=0, atol=1e-4)
    assert np.abs(logits(ours, "lora") - plain).max() > 0.1


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma4_text"])
def test_gemma(transformers, peft, tmp_path, model_type):
    shape = gemma.GEMMA3 if model_type == "gemma3_text" else {**gemma.GEMMA4, **SPLIT}
    targets = (
        [*PROJECTIONS, "per_layer_input_gate", "per_layer_projection"] if model_type == "gemma4_text" else PROJECTIONS
    )
    expected = with_adapter(peft, gemma.text_model(transformers, model_type, shape), tmp_path, targets)
    ours = loaded(tmp_path, lora="adapter")
    np.testing.assert_allclose(logits(ours, "lora"), gemma.hf_logits(expected, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "qwen3_5"])
def test_decoders_beside_an_encoder(transformers, peft, tmp_path, model_type):
    linear = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"] if model_type == "qwen3_5" else []
    model, _ = qwen.make(transformers, tmp_path / "unused", model_type)
    targets = rf".*language_model.*\.({'|'.join([*PROJECTIONS, *linear])})"
    expected = with_adapter(peft, model, tmp_path, targets)
    ours = loaded(tmp_path, lora="adapter")
    np.testing.assert_allclose(logits(ours, "lora"), hf_logits(expected), rtol=0, atol=1e-4)


def test_logits_are_those_of_mlx_lm(tmp_path):
    from mlx_lm import load as mlx_lm_load

    tiny_model.write(tmp_path / "base")
    plain, _ = mlx_lm_load(str(tmp_path / "base"))
    sizes = {
        f"model.layers.{i}.{name}": (module.weight.shape[1], module.weight.shape[0])
        for i, layer in enumerate(plain.layers)
        for name, module in layer.named_modules()
        if name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert len(sizes) == 3 * len(plain.layers)
    write_mlx(tmp_path / "adapter", sizes, rank=5, scale=3.0)
    expected, _ = mlx_lm_load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapter"))
    ours = loaded(tmp_path, lora="adapter")
    given = np.array(expected(mx.array(TOKENS)))
    np.testing.assert_allclose(logits(ours, "lora"), given, rtol=0, atol=1e-4)
    assert np.abs(given - np.array(plain(mx.array(TOKENS)))).max() > 0.1
