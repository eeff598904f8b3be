"""What the layers of one forward share: its rows, their lengths in few shapes, and which positions each query sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from workers.cache.placement import Run
from workers.kernels.base import MAX_ROWS, MAX_VERIFY_WIDTH
from workers.kernels.pages import Pages, slot_pages, tiles

ROUND_TOKENS = 512

Spans = list[list[tuple[int, int]]]
"""Per row of a batch: (first, end) positions of the stretches whose tokens see each other. Each lies in one step."""


@dataclass
class BatchShape:
    """What the layers of one forward share: rows, their first positions, the step's width, and masks made so far."""

    runs: list[Run]
    starts: list[int]  # (B,)
    width: int  # input tokens per row, padding included
    is_exact: bool  # lengths as they are (CPU) or rounded up to buckets (GPU: few shapes)
    offset: int | mx.array = 0
    masks: dict[tuple[int, int, int, int | None], mx.array | None] = field(default_factory=dict)
    biases: dict[tuple[int | None, ...], mx.array] = field(default_factory=dict)
    indices: dict[tuple[int, int], tuple[mx.array, ...]] = field(default_factory=dict)
    spans: Spans | None = None  # per row, where its images lie
    tables: dict[tuple[int, int], Pages] = field(default_factory=dict)
    tile_tables: dict[tuple[int, int], Pages] = field(default_factory=dict)
    chunk_masks: dict[tuple[int, int], mx.array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.offset = self.starts[0] if len(self.starts) == 1 else mx.array(self.starts, dtype=mx.int32)

    def ends(self, run: Run) -> list[int]:
        return [s + self.width for s in self.starts[run.first : run.first + run.size]]

    def pages(self, run: Run) -> Pages:
        """A run's rows as pages of one block each, made once for all layers."""
        if (run.first, run.size) not in self.tables:
            starts = self.starts[run.first : run.first + run.size]
            self.tables[run.first, run.size] = slot_pages(range(run.row, run.row + run.size), starts)
        return self.tables[run.first, run.size]

    def key_length(self, run: Run, capacity: int) -> int:
        """How many pool indices the run's rows attend to."""
        longest = max(self.ends(run))
        # On a GPU one decode row, or prefill chunks that end together, are attended at their exact length without a
        # mask; verify rows and ragged batches come in few shapes, since a new one is planned anew.
        is_chunk = self.width > MAX_VERIFY_WIDTH and min(self.ends(run)) == longest
        if not self.is_exact and not is_chunk and (run.size > 1 or self.width > 1):
            longest = bucket_length(longest)
        return min(longest, capacity)

    def tiles(self, run: Run) -> Pages:
        """A run's rows cut into tiles of MAX_ROWS tokens, made once for all layers."""
        if (run.first, run.size) not in self.tile_tables:
            self.tile_tables[run.first, run.size] = tiles(self.pages(run), MAX_ROWS, self.width // MAX_ROWS)
        return self.tile_tables[run.first, run.size]

    def chunk_mask(self, old: int, window: int, dtype: mx.Dtype) -> mx.array:
        """What a chunk sees of `old` positions before it and its own, (width, old + width), as a number that is added
        to the scores: made once for all layers of a window. A GPU adds a mask faster than it selects by one.
        """
        if (old, window) not in self.chunk_masks:
            distance = mx.arange(old, old + self.width)[:, None] - mx.arange(old + self.width)
            seen = (distance >= 0) & (distance < window)
            self.chunk_masks[old, window] = mx.where(seen, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
        return self.chunk_masks[old, window]

    @property
    def is_aligned(self) -> bool:
        """Do all rows start together, in one class?"""
        return len(self.runs) == 1 and min(self.starts) == max(self.starts)

    @property
    def is_round(self) -> bool:
        """Are these chunks of lengths that come again and again? MLX plans a new pair of lengths for 0.1 s and more."""
        start = self.starts[0]
        return self.is_aligned and (start == 0 or (start % ROUND_TOKENS == 0 and self.width % ROUND_TOKENS == 0))


def bucket_length(length: int) -> int:
    """Lengths in steps of an eighth of their size, at least 64: few shapes, little waste."""
    step = 64
    while step * 8 < length:
        step *= 2
    return -(-length // step) * step


def position_mask(
    shape: BatchShape, run: Run, length: int, capacity: int, window: int | None, spans: Spans | None = None
) -> mx.array:
    """Boolean (rows, 1, width, length): does the query at start+i see pool index j?

    Index j of a row that ends at `end` holds the newest position p < end with p % capacity == j.
    """
    starts = mx.array(shape.starts[run.first : run.first + run.size])[:, None, None, None]
    end = starts + shape.width
    j = mx.arange(length)[None, None, None, :]
    positions = end - 1 - (end - 1 - j) % capacity if max(shape.ends(run)) > capacity else j
    queries = starts + mx.arange(shape.width)[None, None, :, None]
    mask = positions <= queries
    if spans is not None:
        mask = mask | _same_span(positions, queries, spans[run.first : run.first + run.size])
    mask = mask & (positions >= 0)
    if window is not None:
        mask = mask & (queries - positions < window)
    return mask


def _same_span(positions: mx.array, queries: mx.array, spans: Spans) -> mx.array:
    """Do a query (rows, 1, width, 1) and a position (rows or 1, 1, 1, length) lie in the same stretch of their row?"""
    same = mx.zeros((1,), mx.bool_)
    for i in range(max(len(row) for row in spans)):
        bounds = [row[i] if i < len(row) else (0, 0) for row in spans]
        first, end = (mx.array(column)[:, None, None, None] for column in zip(*bounds, strict=True))
        same = same | ((positions >= first) & (positions < end) & (queries >= first) & (queries < end))
    return same


def pieces(run: Run, shape: BatchShape) -> list[tuple[int, int]]:
    """How to cut a run for attention: one padded batch, or row by row at exact lengths, whichever costs less.

    Microseconds on a 2-core CPU, 9 query and 3 key-value heads of 64: a padded batch takes about 25 + 0.22 n a row for
    its longest row n, single rows 55 + 0.3 n each. On a GPU launches dominate: always one batch.
    """
    if run.size == 1 or not shape.is_exact:
        return [(0, run.size)]
    ends = shape.ends(run)
    if run.size * (25 + 0.22 * max(ends)) <= sum(55 + 0.3 * e for e in ends):
        return [(0, run.size)]
    return [(i, 1) for i in range(run.size)]
