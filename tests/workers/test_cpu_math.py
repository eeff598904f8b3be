"""The CPU's own exponentials against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from workers import cpu_math


def test_exp2_is_exact_for_whole_numbers_and_near_elsewhere():
    whole = mx.arange(-100, 127).astype(mx.float32)
    np.testing.assert_array_equal(np.array(cpu_math.exp2(whole)), 2.0 ** np.arange(-100, 127))
    x = mx.linspace(-100, 126, 400_001)
    expected = 2.0 ** np.array(x, dtype=np.float64)
    np.testing.assert_allclose(np.array(cpu_math.exp2(x)), expected, rtol=3e-7)


def test_exp2_is_bounded_below_and_keeps_nan():
    x = mx.array([-np.inf, -1e30, -101.0, np.nan])
    bounded, is_nan = np.array(cpu_math.exp2(x))[:3], np.isnan(np.array(cpu_math.exp2(x))[3])
    np.testing.assert_array_equal(bounded, 2.0**cpu_math.LOWEST)
    assert is_nan


def test_silu():
    x = mx.concatenate([mx.linspace(-120, 120, 100_001), mx.array([-1e30, 1e30, 0.0])])
    wide = np.array(x, dtype=np.float64)
    with np.errstate(over="ignore"):
        expected = wide / (1.0 + np.exp(-wide))
    np.testing.assert_allclose(np.array(cpu_math.silu(x)), expected, rtol=1e-6, atol=1e-7)


def test_softmax_gives_nothing_to_what_is_forbidden():
    x = np.random.default_rng(3).normal(0, 8, (5, 3000)).astype(np.float32)
    x[:, ::7] = -np.inf
    wide = x.astype(np.float64)
    expected = np.exp(wide - wide.max(axis=-1, keepdims=True))
    expected /= expected.sum(axis=-1, keepdims=True)
    found = np.array(cpu_math.softmax(mx.array(x)))
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=1e-9)
    assert (found[:, ::7] == 0.0).all()
