"""Attention on the CPU against MLX's own operation."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from workers.cache import cpu_attention


def arrays(batch, heads, kv_heads, length, num_keys, dim=16, value_dim=16):
    mx.random.seed(5)
    q = mx.random.normal((batch, length, heads, dim)).swapaxes(1, 2)  # as a model gives it: not contiguous
    pool = mx.random.normal((batch, kv_heads, num_keys + 13, dim))
    values = mx.random.normal((batch, kv_heads, num_keys + 13, value_dim))
    return q, pool[:, :, :num_keys], values[:, :, :num_keys]


def bias_of(mask):
    return mx.where(mask, 0.0, cpu_attention.MASKED)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "num_keys"), [
    (1, 9, 3, 1, 1200), (4, 4, 4, 1, 700),
    (1, 9, 3, 2, 2), (1, 4, 4, 5, 40), (3, 6, 2, 4, 33), (2, 8, 1, 128, 200), (1, 9, 3, 128, 700),
])  # fmt: skip
def test_equals_the_stock_operation(batch, heads, kv_heads, length, num_keys, has_sinks):
    q, k, v = arrays(batch, heads, kv_heads, length, num_keys, value_dim=24)
    seen = (mx.random.uniform(shape=(batch, 1, length, num_keys)) < 0.6) | (mx.arange(num_keys) == 0)
    sinks = mx.random.normal((heads,)) if has_sinks else None
    assert cpu_attention.is_suited(q, k, v)
    found = cpu_attention.attend(q, k, v, 0.25, bias_of(seen), sinks)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=seen, sinks=sinks)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=2e-5, atol=2e-6)


def test_pieces_are_no_approximation(monkeypatch):
    q, k, v = arrays(1, 6, 2, 37, 90)
    whole = cpu_attention.attend(q, k, v, 0.25, None, None)
    monkeypatch.setattr(cpu_attention, "PIECE", 6 * 90 * 5)
    pieces = cpu_attention.attend(q, k, v, 0.25, None, None)
    assert pieces.shape == whole.shape == (1, 6, 37, 16)
    np.testing.assert_allclose(np.array(pieces), np.array(whole), rtol=1e-5, atol=1e-6)


def test_short_single_rows_are_left_to_the_stock_operation():
    assert not cpu_attention.is_suited(*arrays(1, 9, 3, 1, 300))
    assert not cpu_attention.is_suited(*(x.astype(mx.bfloat16) for x in arrays(1, 9, 3, 8, 300)))


def test_nan_is_not_hidden():
    q, k, v = arrays(1, 2, 2, 3, 8)
    k[:, 1, 2] = mx.nan
    found = np.array(cpu_attention.attend(q, k, v, 0.25, None, None))
    assert np.isnan(found[:, 1]).all() and not np.isnan(found[:, 0]).any()
