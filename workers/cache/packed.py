"""Rows of different widths in one forward: all their tokens lie behind each other in a single batch row.

Products then see every token of decode rows, verify rows and prefill chunks at once, and no padding. That is what a CPU
gains from, where each product reads all weights and costs by the token; attention goes on stretch by stretch, through
the views that batches of one width have. See docs/speculation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from workers.cache.batch_shape import BatchShape
from workers.cache.kv import KVLayer, KVView
from workers.cache.placement import Run
from workers.models.rope import Rotate, rotated_pair


@dataclass
class Stretch:
    """Adjacent pool rows whose steps are equally wide: one batch for attention. Their tokens begin at `first`."""

    first: int
    shape: BatchShape

    @property
    def end(self) -> int:
        return self.first + len(self.shape.starts) * self.shape.width

    def cut(self, x: mx.array) -> mx.array:
        """Its rows (n, heads, width, D) of packed tokens (1, heads, T, D)."""
        part, num_rows = x[:, :, self.first : self.end], len(self.shape.starts)
        if num_rows == 1:
            return part
        _, heads, _, dim = part.shape
        return part.reshape(heads, num_rows, self.shape.width, dim).swapaxes(0, 1)


def join(x: mx.array) -> mx.array:
    """The reverse of `Stretch.cut`: (n, heads, width, D) -> (1, heads, n * width, D)."""
    return x if x.shape[0] == 1 else x.swapaxes(0, 1).reshape(1, x.shape[1], -1, x.shape[3])


def stretches(
    places: Sequence[tuple[int, int]], starts: Sequence[int], widths: Sequence[int]
) -> tuple[list[int], list[Stretch]]:
    """Args:
        places: (class, pool row) of each row.
        starts: positions of the rows' first tokens.
        widths: tokens of each row.
    Returns:
        the order in which the rows are packed, and their stretches in that order.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    cut: list[list[int]] = []
    for i in order:
        capacity_class, row = places[i]
        before = cut[-1][-1] if cut else None
        if before is not None and places[before] == (capacity_class, row - 1) and widths[before] == widths[i]:
            cut[-1].append(i)
        else:
            cut.append([i])
    made, first = [], 0
    for members in cut:
        run = Run(*places[members[0]], 0, len(members))
        shape = BatchShape([run], [starts[i] for i in members], widths[members[0]], is_exact=True)
        made.append(Stretch(first, shape))
        first = made[-1].end
    return order, made


class PackedView:
    """One attention layer as a packed forward sees it: `LayerCache` of workers/models/base.py.

    Args:
        positions: (1, T) int32, of every token.
    """

    def __init__(self, layer: KVLayer, parts: Sequence[Stretch], positions: mx.array) -> None:
        self._parts = [(part, KVView(layer, part.shape)) for part in parts]
        self.offset = positions

    def attend(
        self,
        q: mx.array,
        k: mx.array | None,
        v: mx.array | None,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        rotation: Rotate | None = None,
        sees_spans: bool = False,
    ) -> mx.array:
        """As `KVView.attend`, for q (1, num_heads, T, key_dim). There are no spans: rows with media are not packed."""
        q, k = rotated_pair(q, k, rotation)
        if k is not None and v is not None:
            self.write(k, v)  # all before the first is read: a pool that is held twice would be copied
        outputs = [join(view.attend(part.cut(q), None, None, scale, window, sinks)) for part, view in self._parts]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    def write(self, k: mx.array, v: mx.array) -> None:
        """Only write the tokens: k and v (1, num_kv_heads, T, dim)."""
        for part, view in self._parts:
            view.write(part.cut(k), part.cut(v))
