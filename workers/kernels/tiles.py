"""Prefill rows through the verify kernel: written first, then attended as many verify rows of the same sequences."""

from __future__ import annotations

import mlx.core as mx

from workers.kernels.base import MAX_ROWS, PagedAttention, Variant
from workers.kernels.pages import Pages, Pool


def attend_in_tiles(
    attention: PagedAttention,
    tensors: tuple[mx.array, mx.array, mx.array],
    pool: Pool,
    pages: Pages,
    tiles: Pages,
    variant: Variant,
) -> mx.array:
    """Write k and v at the rows' positions and attend causally: (B, num_heads, L, dim).

    A tile reads what is before it from the pool, where all tiles lie already; that it writes its own rows once more
    changes nothing.

    Args:
        tensors: q, k and v (B, heads, L, dim), rotated; L a multiple of MAX_ROWS.
        tiles: `pages` cut by `workers.kernels.pages.tiles` into rows of MAX_ROWS.
    """
    q, k, v = tensors
    attention.append(k, v, pool, pages, 0)
    count = q.shape[2] // MAX_ROWS
    out = attention.attend(_cut(q, count), _cut(k, count), _cut(v, count), pool, tiles, variant)
    return _join(out, q.shape[0])


def attend_joined_in_tiles(
    attention: PagedAttention,
    qkv: mx.array,
    num_heads: int,
    pool: Pool,
    pages: Pages,
    tiles: Pages,
    variant: Variant,
) -> mx.array:
    """The same of one product's rows (B, L, ...): as `PagedAttention.attend_joined` gives them, (B, L, heads * dim)."""
    attention.append_joined(qkv, num_heads, pool, pages, variant)
    batch, length, width = qkv.shape
    cut = qkv.reshape(batch * length // MAX_ROWS, MAX_ROWS, width)
    return attention.attend_joined(cut, num_heads, pool, tiles, variant).reshape(batch, length, -1)


def _cut(x: mx.array, count: int) -> mx.array:
    """(B, heads, count * n, D) -> (B * count, heads, n, D)."""
    batch, heads, length, dim = x.shape
    return x.reshape(batch, heads, count, length // count, dim).swapaxes(1, 2).reshape(-1, heads, length // count, dim)


def _join(x: mx.array, batch: int) -> mx.array:
    """The reverse of `_cut`."""
    _, heads, length, dim = x.shape
    return x.reshape(batch, -1, heads, length, dim).swapaxes(1, 2).reshape(batch, heads, -1, dim)
