"""The gated delta rule on CUDA: one launch for all tokens of a layer, where mlx-lm loops over them (gated_delta.cuh).

On Metal mlx-lm has kernels of its own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from workers.kernels.sources import include

ROWS = 2  # of the state, that eight lanes hold
THREADS = 128
INPUTS = ["q", "k", "v", "g", "beta", "state", "is_real"]
BODY = """tandem_delta::run<T, TG, TB, DK, ROWS, VECTOR, MASKED>(
    q, k, v, g, beta, state, is_real, q_shape[1], q_shape[2], v_shape[2], v_shape[3], y, after);"""


def header() -> str:
    return include("gated_delta.cuh")


def supports(key_dim: int, value_dim: int) -> bool:
    """Is there a kernel for heads of these sizes?"""
    return key_dim % 8 == 0 and key_dim <= 256 and value_dim % ROWS == 0


class CudaDelta:
    """The rule as one kernel. Called as `workers.models.gated_delta.chunked` is."""

    def __init__(self) -> None:
        self._kernel: Any = mx.fast.cuda_kernel(
            name="tandem_gated_delta", input_names=INPUTS, output_names=["y", "after"], source=BODY, header=header()
        )
        self._all_real = mx.ones((1,), mx.bool_)

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        batch, _, num_heads, value_dim = v.shape
        lanes = 8 * -(-value_dim // ROWS)
        y, after = self._kernel(
            inputs=[q, k, v, g, beta, state, self._all_real if mask is None else mask],
            template=[
                ("T", q.dtype), ("TG", g.dtype), ("TB", beta.dtype), ("DK", q.shape[-1]), ("ROWS", ROWS),
                ("VECTOR", g.ndim == 4), ("MASKED", mask is not None),
            ],
            output_shapes=[v.shape, state.shape],
            output_dtypes=[q.dtype, mx.float32],
            grid=(-(-lanes // THREADS) * THREADS, batch * num_heads, 1),
            threadgroup=(THREADS, 1, 1),
        )  # fmt: skip
        return y, after
