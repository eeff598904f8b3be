"""What `cache.attend` asks of an implementation of attention over pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from workers.kernels.pages import Pages, Pool
from workers.models.rope import Rotation

MAX_VERIFY_WIDTH = 32  # wider forwards are prefill chunks
MAX_ROWS = 16  # query rows a sequence that a kernel takes
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
MAX_GROUP = 16  # query heads that share a key-value head


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each query's and each key's vector: `q` and `k` (dim,) are their weights."""

    q: mx.array
    k: mx.array
    eps: float


@dataclass(frozen=True)
class Variant:
    """What one layer computes besides plain causal attention.

    Args:
        window: the last `window` positions only.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: (num_heads,) attention sink logits.
        rotation: applied to q and k first.
        norms: applied before that; by `attend_joined` only.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: mx.array | None = None
    rotation: Rotation | None = None
    norms: HeadNorms | None = None


class PagedAttention(Protocol):
    """Decode, verify and the writing of rows. Shapes as in `LayerCache.attend`."""

    def attend(self, q: mx.array, k: mx.array, v: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        """Write k and v at the rows' positions, attend causally: (B, num_heads, R, dim), R at most MAX_ROWS."""

    def attend_written(self, q: mx.array, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        """As `attend`, for a layer that shares another's keys and values: that one wrote the rows, in this forward.

        Only q is rotated, nothing is written. What writes to the pool next waits for this reading.
        """

    def attend_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> mx.array:
        """As `attend`, from one product's rows (B, R, (num_heads + 2 * num_kv_heads) * dim): queries, keys, values.

        Returns:
            (B, R, num_heads * dim), as the projection behind it takes them.
        """

    def append_joined(self, qkv: mx.array, num_heads: int, pool: Pool, pages: Pages, variant: Variant) -> None:
        """Only write: the keys, normed and rotated, and values of one product's rows (B, L, ...), L of any size."""

    def append(self, k: mx.array, v: mx.array, pool: Pool, pages: Pages, old: int) -> tuple[mx.array, mx.array]:
        """Write k and v; return keys and values of the `old` positions before them and of their own.

        Each is (B, num_kv_heads, old + L, dim); `old` is at most the smallest start.
        """
