"""The kernels' arithmetic in stock operations: for machines without a kernel, and what a kernel is checked against.

It gathers each row's pages into a padded rectangle and masks that, in 32 bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from workers.kernels.base import HeadNorms, PagedAttention, Variant
from workers.kernels.pages import Pages, Pool
from workers.models.rope import rotated


class ReferenceAttention:
    """`PagedAttention`. Writes are functional: the pool's arrays are rebound."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        write_rows(pool, pages, rotated_rows(k, pages, variant), v)
        return self._attend(q, pool, pages, variant)

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return self._attend(q, pool, pages, variant)

    def attend_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        return attend_apart(self, qkv, num_heads, pool, pages, variant)

    def append_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> None:
        _, k, v = apart(qkv, num_heads, pool.num_kv_heads, variant.norms)
        write_rows(pool, pages, rotated_rows(k, pages, variant), v)

    @staticmethod
    def _attend(q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        batch, heads, rows, dim = q.shape
        num_kv_heads = pool.keys.shape[1]
        q = rotated_rows(q, pages, variant)
        n = min(max(pages.host_starts) + rows, pages.table.shape[1] * pool.block_size)  # a ring holds no more
        positions = pages.starts[:, None] + (rows - n) + mx.arange(n)  # (B, n), negative before the first
        keys, values = (_gather(a, pages, positions).astype(mx.float32) for a in (pool.keys, pool.values))
        grouped = q.astype(mx.float32).reshape(batch, num_kv_heads, heads // num_kv_heads, rows, dim)
        scores = (grouped @ keys[:, :, None].swapaxes(-1, -2)) * variant.scale
        if variant.softcap is not None:
            scores = mx.tanh(scores / variant.softcap) * variant.softcap
        queries = pages.starts[:, None] + mx.arange(rows)
        distance = queries[:, :, None] - positions[:, None]  # (B, R, n)
        seen = (distance >= 0) & (positions >= 0)[:, None]
        if variant.window is not None:
            seen = seen & (distance < variant.window)
        scores = mx.where(seen[:, None, None], scores, -mx.inf)
        if variant.sinks is not None:
            sinks = variant.sinks.astype(mx.float32).reshape(1, num_kv_heads, -1, 1, 1)
            scores = mx.concatenate([mx.broadcast_to(sinks, (*scores.shape[:-1], 1)), scores], axis=-1)
        weights = mx.softmax(scores, axis=-1)
        if variant.sinks is not None:
            weights = weights[..., 1:]
        # What no query sees may be NaN, and 0 * NaN is NaN.
        values = mx.where(seen.any(axis=1)[:, None, :, None], values, 0.0)
        out = weights @ values[:, :, None]
        return out.reshape(batch, heads, rows, values.shape[-1]).astype(q.dtype)

    def append(self, k: mx.array, v: mx.array, pool: Pool, pages: Pages, old: int) -> tuple[mx.array, mx.array]:
        gathered = []
        for array, new in ((pool.keys, k), (pool.values, v)):
            before = [
                _gather(array, _one(pages, b), mx.arange(start - old, start)[None])
                for b, start in enumerate(pages.host_starts)
            ]
            gathered.append(mx.concatenate([mx.concatenate(before), new.astype(array.dtype)], axis=2) if old else new)
        write_rows(pool, pages, k, v)
        return gathered[0], gathered[1]


def attend_apart(
    attention: PagedAttention, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant
) -> mx.array:
    """`attend_joined` by `attend`, for an implementation that has nothing better."""
    q, k, v = apart(qkv, num_heads, pool.num_kv_heads, variant.norms)
    return attention.attend(q, k, v, pool, pages, variant).swapaxes(1, 2).reshape(*qkv.shape[:2], -1)


def apart(
    qkv: mx.array, num_heads: int, num_kv_heads: int, norms: HeadNorms | None
) -> tuple[mx.array, mx.array, mx.array]:
    """What `attend_joined` gets, as `attend` takes it: normed, (B, heads, R, dim) each."""
    rows = qkv.reshape(*qkv.shape[:2], num_heads + 2 * num_kv_heads, -1)
    q, k, v = mx.split(rows, [num_heads, num_heads + num_kv_heads], axis=2)
    if norms is not None:
        q, k = mx.fast.rms_norm(q, norms.q, norms.eps), mx.fast.rms_norm(k, norms.k, norms.eps)
    return q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)


def rotated_rows(x: mx.array, pages: Pages, variant: Variant) -> mx.array:
    """x (B, heads, R, dim) at the rows' positions: these may be a part of the rows that the rotation was made for."""
    if variant.rotation is None:
        return x
    return rotated(x, replace(variant.rotation, offset=pages.starts))


def _one(pages: Pages, b: int) -> Pages:
    return Pages(pages.table[b : b + 1], pages.starts[b : b + 1], pages.host_starts[b : b + 1], pages.shift)


def _where(pages: Pages, block_size: int, positions: mx.array) -> tuple[mx.array, mx.array]:
    """Blocks and indices in them of positions (B, n): both (B, n)."""
    held: Any = pages.table
    assert memoryview(held).c_contiguous, "kernels read a table by its pointer"
    index = (positions // block_size) % pages.table.shape[1]
    return mx.take_along_axis(pages.table, index, axis=1), positions % block_size


def _gather(array: mx.array, pages: Pages, positions: mx.array) -> mx.array:
    """(B, num_kv_heads, n, dim) of positions (B, n); negative ones give position 0."""
    blocks, offsets = _where(pages, array.shape[2], mx.maximum(positions, 0))
    heads = mx.arange(array.shape[1])
    return array[blocks[:, None], heads[None, :, None], offsets[:, None]]


def write_rows(pool: Pool, pages: Pages, k: mx.array, v: mx.array) -> None:
    """Scatter k and v (B, num_kv_heads, L, dim) to their pages; the pool's arrays are rebound."""
    positions = pages.starts[:, None] + mx.arange(k.shape[2])
    blocks, offsets = _where(pages, pool.block_size, positions)
    heads = mx.arange(k.shape[1])[None, :, None]
    keys, values = pool.keys, pool.values
    keys[blocks[:, None], heads, offsets[:, None]] = k.astype(keys.dtype)
    values[blocks[:, None], heads, offsets[:, None]] = v.astype(values.dtype)
    pool.keys, pool.values = keys, values
