"""The gated unit over joined rows: which rows the kernel gets, and that one which is wrong gets none."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("mlx.core")

import mlx.core as mx
from mlx import nn

from workers.kernels import gate
from workers.models.decoder import swiglu

pytestmark = pytest.mark.mlx


def rows(count: int, width: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return (4 * mx.random.normal((1, count, width), key=mx.random.key(count))).astype(dtype)


def rounded_as_the_kernel_rounds(joined: mx.array) -> mx.array:
    """What gate.cuh computes: float32 inside, rounded after the sigmoid, the product and the end."""
    values, up = (half.astype(mx.float32) for half in mx.split(joined, 2, axis=-1))
    sigmoid = (1 / (1 + mx.exp(-values))).astype(joined.dtype).astype(mx.float32)
    silu = (values * sigmoid).astype(joined.dtype).astype(mx.float32)
    return (silu * up).astype(joined.dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_the_kernels_arithmetic_is_that_of_stock_operations(dtype: mx.Dtype) -> None:
    joined = rows(64, 512, dtype)
    ours, stock = rounded_as_the_kernel_rounds(joined), swiglu(*mx.split(joined, 2, axis=-1))
    exact = nn.silu(joined[..., :256].astype(mx.float32)) * joined[..., 256:].astype(mx.float32)
    scale = 2.0**-8 if dtype == mx.bfloat16 else 2.0**-11
    for found in (ours, stock):
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(exact), rtol=3 * scale, atol=8 * scale)


def test_few_rows_and_rows_that_do_not_fit_go_by_stock_operations() -> None:
    least = gate.MIN_SIZE // 1024
    assert gate.suits(rows(least, 1024))
    assert not gate.suits(rows(least - 1, 1024))
    assert not gate.suits(rows(2 * least, 1032))  # half a row is no whole number of vectors
    assert not gate.suits(rows(least, 1024, mx.float32))
    assert not gate.suits(rows(least, 1024)[0])


def test_without_cuda_stock_operations_do_it() -> None:
    joined = rows(gate.MIN_SIZE // 1024, 1024)
    out = gate.SiluGate(swiglu)(joined)
    assert mx.array_equal(out, swiglu(*mx.split(joined, 2, axis=-1)))


def test_a_kernel_is_used_only_if_it_runs_and_is_right(caplog: pytest.LogCaptureFixture) -> None:
    def fails(joined: mx.array) -> mx.array:
        raise RuntimeError("no compiler")

    assert gate.proven(rounded_as_the_kernel_rounds, swiglu) is rounded_as_the_kernel_rounds
    assert gate.proven(fails, swiglu) is None
    assert gate.proven(lambda joined: 1.1 * rounded_as_the_kernel_rounds(joined), swiglu) is None
    assert [record.getMessage().split(" here")[0] for record in caplog.records] == [
        "the kernel of the gated unit does not run", "the kernel of the gated unit gives other values",
    ]  # fmt: skip
