"""Which implementation of attention a layer uses: a kernel where it has proved itself on this machine, else stock.

A kernel is asked for by shape class: the layer's heads and dimensions, and the width of the forward. It is checked
against the reference on random ragged rows (values), and against the stock path of the slots (time).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from workers.cache.spec import AttentionSpec
from workers.kernels.base import MAX_ROWS, MAX_VERIFY_WIDTH, PagedAttention

Form = Literal["apart", "joined", "normed"]
"""How a layer hands over its rows: queries, keys and values by themselves, or as one product's rows, with or without
norms of theirs to come; see `PagedAttention.attend_joined`."""


@dataclass(frozen=True)
class ShapeClass:
    """What a kernel is compiled for and checked by.

    Args:
        rows: query rows a sequence; 0 is a prefill chunk.
        is_shared: another layer wrote the keys and values, see `PagedAttention.attend_written`.
    """

    num_heads: int
    num_kv_heads: int
    dim: int
    rows: int
    dtype: mx.Dtype
    is_shared: bool = False
    form: Form = "apart"

    @property
    def name(self) -> str:
        """As in the log: "decode 4 rows, 32/8 heads of 128, bfloat16"."""
        what = f"{self.rows} query rows" if self.rows else "prefill chunks"
        kind = str(self.dtype).rpartition(".")[2]
        more = ", keys of another layer" if self.is_shared else "" if self.form == "apart" else f", {self.form}"
        return f"{what}, {self.num_heads}/{self.num_kv_heads} heads of {self.dim}, {kind}{more}"


@dataclass(frozen=True)
class Use:
    attention: PagedAttention
    is_decode: bool  # attends itself; otherwise it writes and gathers a prefill chunk


@dataclass
class AttentionChoice:
    """Args:
    attention: the implementation.
    is_used: by shape class; a class that is not named here uses stock operations.
    has_tiles: prefill rows at any position go through the verify kernel in tiles.
    """

    attention: PagedAttention
    is_used: Mapping[ShapeClass, bool] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    has_tiles: bool = False
    _joined: dict[tuple[object, ...], PagedAttention | None] = field(default_factory=dict)

    def use(self, spec: AttentionSpec, q: mx.array, v: mx.array, width: int) -> Use | None:
        """The implementation for a forward of `width` tokens a row through a layer of this kind."""
        if spec.key_dim != spec.value_dim:
            return None
        if MAX_ROWS < width <= MAX_VERIFY_WIDTH:
            return None
        rows = width if width <= MAX_ROWS else 0
        shape = ShapeClass(q.shape[1], spec.num_kv_heads, spec.key_dim, rows, q.dtype)
        return Use(self.attention, rows > 0) if self.is_used.get(shape, False) else None

    def shared(self, spec: AttentionSpec, q: mx.array, width: int) -> PagedAttention | None:
        """The implementation for a layer that reads what another one of this kind wrote: decode and verify rows."""
        if spec.key_dim != spec.value_dim or width > MAX_ROWS:
            return None
        shape = ShapeClass(q.shape[1], spec.num_kv_heads, spec.key_dim, width, q.dtype, is_shared=True)
        return self.attention if self.is_used.get(shape, False) else None

    def joined(
        self, spec: AttentionSpec, num_heads: int, dtype: mx.Dtype, width: int, has_norms: bool
    ) -> PagedAttention | None:
        """The implementation for one product's rows: those of decoding and verifying, and of prefill chunks
        in tiles. Looked up once: each layer asks.
        """
        key = (num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim, dtype, width, has_norms)
        if key not in self._joined:
            form: Form = "normed" if has_norms else "joined"
            rows = width
            if width > MAX_ROWS:
                rows = MAX_ROWS if self.has_tiles and width % MAX_ROWS == 0 else 0
            shape = ShapeClass(num_heads, spec.num_kv_heads, spec.key_dim, rows, dtype, form=form)
            is_used = spec.key_dim == spec.value_dim and self.is_used.get(shape, False)
            self._joined[key] = self.attention if is_used else None
        return self._joined[key]

    @property
    def may_have_tiles(self) -> bool:
        """Tiles are verify rows whose keys and values were appended as a chunk; Metal has no kernel for that."""
        return any(shape.rows == 0 and is_used for shape, is_used in self.is_used.items())

    @property
    def takes_any_starts(self) -> bool:
        """May prefill rows that begin at different positions share a forward? Everything goes through kernels then."""
        return self.has_tiles and self.may_have_tiles and all(self.is_used.values())

    def tiles(self, spec: AttentionSpec, q: mx.array, v: mx.array, width: int) -> PagedAttention | None:
        """The implementation that takes `width` tokens a row as many verify rows of one sequence; see `attend`."""
        if not self.has_tiles or spec.key_dim != spec.value_dim or width <= MAX_ROWS or width % MAX_ROWS:
            return None
        shapes = [ShapeClass(q.shape[1], spec.num_kv_heads, spec.key_dim, rows, q.dtype) for rows in (MAX_ROWS, 0)]
        return self.attention if all(self.is_used.get(shape, False) for shape in shapes) else None
