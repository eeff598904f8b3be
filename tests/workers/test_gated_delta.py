"""The gated delta rule in chunks against the loop over tokens in 64 bits."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import gated_delta as mlx_lm_gated_delta
from mlx_lm.models import qwen3_next

from shared.model_files import ModelFiles
from tests.support import tiny_qwen35
from workers.load import load
from workers.models import gated_delta
from workers.models.gated_delta import CHUNK, GatedDelta, chunked, inverse, stepwise

pytestmark = pytest.mark.mlx


def inputs(batch: int, length: int, key_heads: int, heads: int, dim: int, value_dim: int, **facts: Any) -> list[Any]:
    """q, k, v, g, beta and a state, as 64-bit arrays."""
    rng = np.random.default_rng(length)
    q, k = (rng.normal(size=(batch, length, key_heads, dim)) for _ in range(2))
    q /= np.linalg.norm(q, axis=-1, keepdims=True) * dim**0.5
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(batch, length, heads, value_dim))
    beta = 1 / (1 + np.exp(-3 * rng.normal(size=(batch, length, heads))))
    g = np.exp(-np.exp(2 * rng.normal(size=heads)) * np.log1p(np.exp(rng.normal(size=(batch, length, heads)))))
    if facts.get("is_alike"):  # nothing decays and every token has the same key: the worst case for the inverse
        k[:], g[:], beta[:] = k[:, :1], 1, 1
    if facts.get("forgets"):
        g[:] = 0
    return [q, k, v, g, beta, rng.normal(size=(batch, heads, value_dim, dim))]


def in_64_bits(arrays: list[Any], mask: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, g, beta, s = arrays
    group = v.shape[2] // k.shape[2]
    q, k = np.repeat(q, group, axis=2), np.repeat(k, group, axis=2)
    rows = []
    for t in range(q.shape[1]):
        moved = s * g[:, t, :, None, None]
        delta = (v[:, t] - np.einsum("bhvk,bhk->bhv", moved, k[:, t])) * beta[:, t, :, None]
        moved = moved + delta[..., None] * k[:, t, :, None, :]
        rows.append(np.einsum("bhvk,bhk->bhv", moved, q[:, t]))
        s = moved if mask is None else np.where(mask[:, t, None, None, None], moved, s)
    return np.stack(rows, axis=1), s


def to_mlx(arrays: list[Any]) -> list[mx.array]:
    return [mx.array(a.astype(np.float32)) for a in arrays]


@pytest.mark.parametrize("facts", [{}, {"is_alike": True}, {"forgets": True}], ids=["any", "alike", "forgets"])
@pytest.mark.parametrize("length", [2, 3, 8, 17, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_chunks_give_what_the_loop_gives(length: int, facts: dict[str, bool]) -> None:
    arrays = inputs(2, length, 2, 6, 16, 12, **facts)
    y, after = chunked(*to_mlx(arrays))
    expected, last = in_64_bits(arrays)
    assert np.abs(np.array(y) - expected).max() < 2e-6
    assert np.abs(np.array(after) - last).max() < 1e-5


def test_masked_tokens_change_nothing() -> None:
    arrays = inputs(3, 70, 1, 2, 8, 8)
    lengths = np.array([70, 1, 33])
    mask = np.arange(70) < lengths[:, None]
    y, after = chunked(*to_mlx(arrays), mx.array(mask))
    expected, last = in_64_bits(arrays, mask)
    assert np.abs(np.array(after) - last).max() < 1e-5
    for row, length in enumerate(lengths):
        assert np.abs(np.array(y)[row, :length] - expected[row, :length]).max() < 2e-6


def test_a_prompt_in_pieces_is_the_prompt_in_one() -> None:
    arrays = to_mlx(inputs(1, 200, 2, 4, 16, 16))
    whole, last = chunked(*arrays)
    state, parts = arrays[5], []
    for first, end in ((0, 128), (128, 131), (131, 200)):
        y, state = chunked(*(a[:, first:end] for a in arrays[:5]), state)
        parts.append(y)
    assert mx.abs(mx.concatenate(parts, axis=1) - whole).max().item() < 2e-6
    assert mx.abs(state - last).max().item() < 1e-5


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_the_inverse_is_one(size: int) -> None:
    a = np.tril(np.random.default_rng(size).uniform(-1, 1, (3, size, size)), -1)
    product = np.array(inverse(mx.array(a.astype(np.float32)))) @ (np.eye(size) + a)
    assert np.abs(product - np.eye(size)).max() < 1e-3 * np.abs(np.linalg.inv(np.eye(size) + a)).max()
    ones = np.tril(np.ones((size, size)), -1)
    assert np.array_equal(np.array(inverse(mx.array(ones.astype(np.float32)))), np.linalg.inv(np.eye(size) + ones))


def test_half_floats_come_back_as_such() -> None:
    arrays = to_mlx(inputs(1, 20, 1, 2, 16, 16))
    halves = [a.astype(mx.bfloat16) for a in arrays[:5]]
    y, after = chunked(*halves, arrays[5])
    expected, last = stepwise(*(a.astype(mx.float32) for a in halves), arrays[5])
    assert (y.dtype, after.dtype) == (mx.bfloat16, mx.float32)
    assert mx.abs(y.astype(mx.float32) - expected).max().item() < 1e-2
    assert mx.abs(after - last).max().item() < 1e-5


def test_models_of_mlx_lm_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What mlx-lm calls is replaced, and one token alone and decay by the key's dimension still go step by step."""
    monkeypatch.setattr(mlx_lm_gated_delta, "gated_delta_ops", stepwise)
    assert gated_delta.install(is_cpu=True) == f"chunks of {CHUNK} tokens"
    assert isinstance(mlx_lm_gated_delta.gated_delta_ops, GatedDelta)
    called: list[int] = []

    def counted(*arguments: Any) -> tuple[mx.array, mx.array]:
        called.append(arguments[0].shape[1])
        return chunked(*arguments)

    monkeypatch.setattr(gated_delta, "chunked", counted)
    layer = tiny_layer(qwen3_next)
    x = mx.random.normal((2, 9, 32), key=mx.random.key(0))
    together = layer(x)
    assert called == [9]
    layer(x[:, :1])
    assert called == [9]
    monkeypatch.setattr(mlx_lm_gated_delta, "gated_delta_ops", stepwise)
    assert mx.abs(layer(x) - together).max().item() < 1e-5
    by_dimension = mx.full((1, 3, 2, 8), 0.5)
    q = mx.random.normal((1, 3, 2, 8), key=mx.random.key(1))
    beta = mx.full((1, 3, 2), 0.5)
    y, after = GatedDelta(None)(q, q, q, by_dimension, beta)
    expected, last = stepwise(q, q, q, by_dimension, beta)
    assert called == [9] and mx.array_equal(y, expected) and mx.array_equal(after, last)


def tiny_layer(module: ModuleType) -> Any:
    names = {
        "model_type": "qwen3_next", "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4, "num_experts": 2,
        "num_experts_per_tok": 1, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [], "moe_intermediate_size": 16, "rms_norm_eps": 1e-6, "vocab_size": 64, "head_dim": 16,
        "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "max_position_embeddings": 512,
    }  # fmt: skip
    return module.Qwen3NextGatedDeltaNet(module.ModelArgs.from_dict(names))


def test_models_with_image_encoders_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their classes are ours, around mlx-lm's text decoder."""
    monkeypatch.setattr(mlx_lm_gated_delta, "gated_delta_ops", stepwise)
    load(ModelFiles(name="m", folder=tiny_qwen35.write(tmp_path)), "float32")
    assert isinstance(mlx_lm_gated_delta.gated_delta_ops, GatedDelta)
