"""The kernel on Metal: the structure of the CUDA one. Not run by anybody yet; the check at start decides about it.

The new rows are written by a stock operation first and read from the pool, so nothing is written behind MLX's back. The
parts of the key axis are joined by stock operations.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

from workers.kernels.base import Variant
from workers.kernels.pages import Pages, Pool
from workers.kernels.params import params_of
from workers.kernels.reference import attend_apart, rotated_rows, write_rows

NUM_SIMDGROUPS = 4
QUERIES = 4  # query vectors a threadgroup keeps in registers
SPLIT_TOKENS = 256
WANTED_THREADGROUPS = 128
INPUTS = ["q", "pool_k", "pool_v", "table", "starts", "params"]


def source() -> str:
    return re.sub(r"//[^\n]*\n", "\n", Path(__file__).with_name("attention.metal").read_text())


class MetalAttention:
    """`PagedAttention.attend` and `attend_written`; prefill chunks stay with the stock path."""

    def __init__(self) -> None:
        self._kernel = mx.fast.metal_kernel(
            name="tandem_attend", input_names=INPUTS, output_names=["partial", "stats"], source=source()
        )

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        write_rows(pool, pages, rotated_rows(k, pages, variant), v)
        return self.attend_written(q, pool, pages, variant)

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        batch, heads, rows, dim = q.shape
        kv_heads = pool.keys.shape[1]
        q = rotated_rows(q, pages, variant)
        num_queries = heads // kv_heads * rows
        parts = -(-num_queries // QUERIES)
        longest = max(pages.host_starts) + rows
        if variant.window is not None:
            longest = min(longest, variant.window + rows)
        splits = max(1, min(-(-longest // SPLIT_TOKENS), WANTED_THREADGROUPS // (batch * kv_heads * parts)))
        threads = 32 * NUM_SIMDGROUPS
        shape = (batch, kv_heads, num_queries, splits)
        partial, stats = self._kernel(  # type: ignore[operator] # MLX types what it returns as object
            inputs=[q, pool.keys, pool.values, pages.table, pages.starts, params_of(variant, pool, pages)],
            template=[
                ("D", dim), ("G", heads // kv_heads), ("R", rows), ("KV", kv_heads), ("QT", QUERIES),
                ("NW", NUM_SIMDGROUPS),
            ],
            grid=(kv_heads * parts * threads, batch, splits), threadgroup=(threads, 1, 1),
            output_shapes=[(*shape, dim), (*shape, 2)], output_dtypes=[mx.float32, mx.float32],
        )  # fmt: skip
        return combine(partial, stats, variant, rows).astype(q.dtype)

    def attend_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return attend_apart(self, qkv, num_heads, pool, pages, variant)

    def append_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> None:
        raise NotImplementedError("no Metal kernel for prefill chunks: the choice never names one")

    def append(self, k: mx.array, v: mx.array, pool: Pool, pages: Pages, old: int) -> tuple[mx.array, mx.array]:
        raise NotImplementedError("no Metal kernel for prefill chunks: the choice never names one")


def combine(partial: mx.array, stats: mx.array, variant: Variant, rows: int) -> mx.array:
    """Join the parts of the key axis.

    Args:
        partial: (B, KV, M, splits, D) weighted sums of values.
        stats: (B, KV, M, splits, 2): the part's largest score, and its sum of exponentials relative to that.
    Returns:
        (B, H, R, D); M counts R outside, heads of the group inside.
    """
    top, total = stats[..., :1], stats[..., 1:]
    best = top.max(axis=-2, keepdims=True)
    batch, kv_heads, num_queries, _, dim = partial.shape
    group = num_queries // rows
    if variant.sinks is not None:
        sinks = mx.tile(variant.sinks.astype(mx.float32).reshape(1, kv_heads, 1, group), (1, 1, rows, 1))
        sinks = sinks.reshape(1, kv_heads, num_queries, 1, 1)
        best = mx.maximum(best, sinks)
    shares = mx.exp(top - best)
    denominator = (shares * total).sum(axis=-2)
    if variant.sinks is not None:
        denominator = denominator + mx.exp(sinks - best)[..., 0]
    out = (shares * partial).sum(axis=-2) / denominator
    return out.reshape(batch, kv_heads, rows, group, dim).swapaxes(2, 3).reshape(batch, kv_heads * group, rows, dim)
