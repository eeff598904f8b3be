"""All layers' caches of all slots, and the views of one forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from workers.cache.batch_shape import BatchShape, Spans
from workers.cache.kv import KVLayer, KVView
from workers.cache.packed import PackedView, stretches
from workers.cache.placement import Placement
from workers.cache.recurrent import RecurrentLayer, RecurrentView, State
from workers.cache.spec import AttentionSpec, LayerSpec, ListSpec, leaves
from workers.kernels.choice import AttentionChoice

View = KVView | PackedView | RecurrentView
RecurrentSnapshot = list[tuple[State, int] | None]
"""One slot's recurrent states, one entry per recurrent layer: references, not copies."""


class ListView:
    """Several caches of one layer, by index (mlx-lm's CacheList)."""

    def __init__(self, views: list[View]) -> None:
        self.caches = views
        self.offset = views[0].offset

    def __getitem__(self, index: int) -> View:
        return self.caches[index]


@dataclass
class Batch:
    """The rows of one forward: `order[i]` is the index, in what was asked for, of row i.

    Args:
        firsts: where each row's tokens begin among all (B * L) of the forward.
        view_of: a view of one more layer.
    """

    order: list[int]
    firsts: list[int]
    layers: list[View | ListView]
    recurrent: list[RecurrentView]
    view_of: Callable[[KVLayer], KVView | PackedView]

    def close(self) -> None:
        """Call once the model was called: recurrent layers keep their new states."""
        for view in self.recurrent:
            view.close()


class CacheStore:
    """Slots, their rows and their content.

    Args:
        specs: one per model layer.
        capacity_classes: slot capacities in tokens, ascending.
        max_width: widest step (prefill chunk, or drafts + 1); sliding rings leave room for it.
        slack: room behind each slot's capacity for the padding of a batch whose rows carry different numbers of drafts.
        dtype: of keys and values.
        is_exact: attend to exact lengths (CPU); otherwise lengths are rounded up to a few shapes (GPU).
    """

    shares_blocks = False  # a restored block of keys and values is a copy, not a reference

    def __init__(
        self,
        specs: list[LayerSpec],
        capacity_classes: list[int],
        max_width: int,
        dtype: mx.Dtype,
        is_exact: bool,
        slack: int = 32,
    ) -> None:
        self.specs = specs
        self.max_width = max_width
        self.placement = Placement(capacity_classes)
        self.is_exact = is_exact
        self._slack = slack
        self._layers = [
            self._attention_layer(s, dtype) if isinstance(s, AttentionSpec) else RecurrentLayer(s)
            for s in leaves(specs)
        ]
        self.kv_layers = [layer for layer in self._layers if isinstance(layer, KVLayer)]
        self.recurrent_layers = [layer for layer in self._layers if isinstance(layer, RecurrentLayer)]
        self.feature_layer: KVLayer | None = None
        self.takes_any_starts = False  # prefill rows that begin at different positions may share a forward
        self._lengths: dict[int, int] = {}  # slot -> positions ever written

    def _attention_layer(self, spec: AttentionSpec, dtype: mx.Dtype) -> KVLayer:
        """An attention layer's cache, as large as the slots that are placed already."""
        layer = KVLayer(spec, self.placement.capacities, self.max_width, self._slack, dtype)
        for capacity_class in range(len(self.placement.capacities)):
            layer.reserve(capacity_class, self.placement.num_rows(capacity_class))
        return layer

    def _view(self, layer: KVLayer, shape: BatchShape) -> KVView:
        return KVView(layer, shape)

    def use_attention(self, choice: AttentionChoice | None) -> None:
        """From now on attend by kernels where `choice` has one; None: stock operations."""
        for layer in self.kv_layers:
            layer.attention = choice
        self.takes_any_starts = choice is not None and choice.takes_any_starts

    @property
    def is_recurrent(self) -> bool:
        return bool(self.recurrent_layers)

    def write_features(self, batch: Batch, features: mx.array) -> None:
        """Keep a forward's fused hidden rows (B, L, H) beside the keys and values, so that a cached prefix has them.

        They live in a layer of their own, half of a row as its key and half as its value: what moves, restores and
        archives blocks needs no case for them.
        """
        size = features.shape[-1]
        if self.feature_layer is None:
            spec = AttentionSpec(1, size // 2, size - size // 2)
            self.feature_layer = self._attention_layer(spec, features.dtype)
            self.kv_layers.append(self.feature_layer)
        rows = features[:, None]
        batch.view_of(self.feature_layer).write(rows[..., : size // 2], rows[..., size // 2 :])

    def read_features(self, slot: int, length: int) -> mx.array | None:
        """Fused hidden rows (length, H) of a slot's first positions; None where none are kept."""
        if self.feature_layer is None:
            return None
        capacity_class, row = self.placement.where(slot)
        pools = (self.feature_layer.keys[capacity_class], self.feature_layer.values[capacity_class])
        return mx.concatenate([pool[row, 0, :length] for pool in pools if pool is not None], axis=-1)

    def ensure(self, slot: int, capacity: int) -> None:
        """Give `slot` room for `capacity` tokens, keeping its content."""
        if self.placement.has_room(slot, capacity):  # nearly always: then no layer is asked
            return
        move = self.placement.ensure(slot, capacity)
        capacity_class = self.placement.where(slot)[0]
        for layer in self.kv_layers:
            layer.reserve(capacity_class, self.placement.num_rows(capacity_class))
            if move is not None:
                layer.move(move, self._lengths.get(slot, 0))

    def release(self, slot: int) -> None:
        self.placement.release(slot)
        self._lengths.pop(slot, None)
        for layer in self.recurrent_layers:
            layer.release(slot)

    def trim(self) -> None:
        """Give back the memory of rows that no slot has, as far as they lie behind all others."""
        for capacity_class in range(len(self.placement.capacities)):
            num_rows = self.placement.trim(capacity_class)
            for layer in self.kv_layers:
                layer.trim(capacity_class, num_rows)

    def set_length(self, slot: int, length: int) -> None:
        """Positions 0 .. length-1 of a slot were filled from elsewhere."""
        self._lengths[slot] = length

    def clear(self, slot: int) -> None:
        """Zero a slot's keys and values, which hold NaN."""
        for layer in self.kv_layers:
            layer.clear(*self.placement.where(slot))

    def snapshot(self, slot: int) -> RecurrentSnapshot:
        return [layer.snapshot(slot) for layer in self.recurrent_layers]

    def rewind(self, num_kept: Mapping[int, int]) -> None:
        """Roll recurrent layers of slots back to the first num_kept[slot] tokens of their last row; see `Trail`."""
        for layer in self.recurrent_layers:
            layer.rewind(num_kept)

    def restore(self, slot: int, snapshot: RecurrentSnapshot) -> None:
        """Back to an earlier state; keys and values need nothing, their length is a number."""
        for layer, state in zip(self.recurrent_layers, snapshot, strict=True):
            layer.restore(slot, state)

    def open(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        width: int,
        lengths: Sequence[int] | None = None,
        spans: Spans | None = None,
    ) -> Batch:
        """Views for one forward of `width` tokens per row, written at positions starts[i] .. starts[i]+width-1.

        Args:
            lengths: real tokens of each row where rows are padded to `width`; recurrent layers need it.
            spans: per row, positions of the images that this step holds, for models whose images see themselves whole.
        """
        assert width <= self.max_width, f"step of width {width}, caches made for {self.max_width}"
        order, shape = self._arrange(slots, starts, width)
        order_slots = [slots[i] for i in order]
        shape.spans = None if spans is None else [spans[i] for i in order]
        for i in order:
            self._lengths[slots[i]] = max(self._lengths.get(slots[i], 0), starts[i] + width)
        host_lengths = [width if lengths is None else lengths[i] for i in order]
        real = None if min(host_lengths) == width else mx.array(host_lengths, dtype=mx.int32)
        recurrent: list[RecurrentView] = []
        flat: list[View] = []
        for each in self._layers:
            if isinstance(each, KVLayer):
                flat.append(self._view(each, shape))
            else:
                view = RecurrentView(each, order_slots, real, shape.offset, host_lengths)
                recurrent.append(view)
                flat.append(view)
        firsts = list(range(0, width * len(order), width))
        return Batch(order, firsts, self._nest(flat), recurrent, lambda layer: self._view(layer, shape))

    @property
    def packs_rows(self) -> bool:
        """Whether `open_packed` is there and worth it: where lengths are exact, and no layer goes token by token."""
        return self.is_exact and not self.is_recurrent

    def open_packed(self, slots: Sequence[int], starts: Sequence[int], widths: Sequence[int]) -> Batch:
        """Views for one forward of a single batch row in which `slots` have widths[i] tokens each, one behind another.

        The layers' `offset` is then the position of every token, (1, sum of widths).
        """
        assert self.packs_rows, "packed rows in a store that has none"
        assert max(widths) <= self.max_width, f"row of width {max(widths)}, caches made for {self.max_width}"
        order, parts = stretches([self.placement.where(slot) for slot in slots], starts, widths)
        firsts: list[int] = []
        positions: list[int] = []
        for i in order:
            self._lengths[slots[i]] = max(self._lengths.get(slots[i], 0), starts[i] + widths[i])
            firsts.append(len(positions))
            positions += range(starts[i], starts[i] + widths[i])
        offset = mx.array(positions, dtype=mx.int32)[None]

        def view_of(layer: KVLayer) -> PackedView:
            return PackedView(layer, parts, offset)

        layers = self._nest([view_of(layer) for layer in self._layers if isinstance(layer, KVLayer)])
        return Batch(order, firsts, layers, [], view_of)

    def _arrange(self, slots: Sequence[int], starts: Sequence[int], width: int) -> tuple[list[int], BatchShape]:
        """Make the caches ready for the rows of a forward; the rows' order, and what its layers share."""
        order_slots, runs, moves = self.placement.gather(list(slots))
        for move in moves:
            longest = max(self._lengths.values(), default=0)
            for layer in self.kv_layers:
                layer.move(move, min(longest, layer.capacities[move.from_class]))
        index = {slot: i for i, slot in enumerate(slots)}
        order = [index[slot] for slot in order_slots]
        return order, BatchShape(runs, [starts[i] for i in order], width, self.is_exact)

    def _nest(self, flat: list[View]) -> list[View | ListView]:
        nested: list[View | ListView] = []
        remaining = iter(flat)
        for spec in self.specs:
            if isinstance(spec, ListSpec):
                nested.append(ListView([next(remaining) for _ in spec.children]))
            else:
                nested.append(next(remaining))
        return nested

    def writes(self) -> list[mx.array]:
        """What to evaluate so that every kernel's write is queued; empty without kernels."""
        return [last for layer in self.kv_layers for last in layer.writes()]

    def pending(self) -> list[mx.array]:
        """Everything a step may have left unevaluated."""
        arrays = [array for layer in self.kv_layers for array in layer.pending()]
        return arrays + [a for layer in self.recurrent_layers for a in layer.pending()]

    def nbytes(self) -> int:
        return sum(k.nbytes() for k in self.kv_layers) + sum(r.nbytes() for r in self.recurrent_layers)


def bytes_per_token(specs: list[LayerSpec], dtype: mx.Dtype) -> int:
    """Cache bytes that one more token of a sequence costs, windows not counted in."""
    return sum(s.row_elements() for s in leaves(specs) if isinstance(s, AttentionSpec)) * dtype.size
