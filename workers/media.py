"""Media of the running sequences: encoder outputs, and what a forward gets of them beside its tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from shared.messages import MediaItem, MediaKind, MediaTensor, StepRow
from workers.cache.batch_shape import Spans
from workers.models.base import MediaModel

MAX_CACHED_BYTES = 256 << 20  # of encoder outputs: about 30 images of 1,000 tokens at 4,096 16-bit values

_DTYPES = {"uint8": np.uint8, "float32": np.float32, "int32": np.int32, "bool": np.bool_}


@dataclass
class _Bound:
    """One sequence's media. Positions from `end` on are all counted, `shift` apart from the token's index."""

    items: Sequence[MediaItem]
    positions: np.ndarray | None  # (3, num_prompt_tokens)
    shift: int
    end: int  # of the last item


class SlotMedia:
    """Args:
    model: encodes and says where positions are not simply counted.
    max_bytes: of encoder outputs that are kept, the least recently used ones go first.
    """

    def __init__(self, model: MediaModel, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._encoded: OrderedDict[bytes, mx.array] = OrderedDict()  # content hash -> (1 + D, num_tokens, H)
        self._bound: dict[int, _Bound] = {}
        self.num_encoder_runs = 0

    def __contains__(self, slot: int) -> bool:
        return slot in self._bound

    @property
    def modalities(self) -> list[MediaKind]:
        return self._model.modalities

    @property
    def whole_media(self) -> list[MediaKind]:
        return self._model.whole_media

    def bind(self, slot: int, num_prompt_tokens: int, items: Sequence[MediaItem]) -> None:
        """A slot's sequence starts."""
        positions = self._model.media_positions(num_prompt_tokens, items)
        shift = 0 if positions is None else int(positions.max()) + 1 - num_prompt_tokens
        self._bound[slot] = _Bound(items, positions, shift, items[-1].start + items[-1].num_tokens)

    def release(self, slot: int) -> None:
        self._bound.pop(slot, None)

    def encode(self, slot: int, index: int) -> mx.array:
        """Rows of one item, lazy where they are new."""
        item = self._bound[slot].items[index]
        found = self._encoded.get(item.content_hash)
        if found is not None:
            self._encoded.move_to_end(item.content_hash)
            return found
        self.num_encoder_runs += 1
        tensors = {t.name: _array(t) for t in item.tensors}
        rows = self._model.encode_media(tensors, item.grid, item.kind)
        assert rows.shape[1] == item.num_tokens, f"{item.kind}: {rows.shape[1]} rows for {item.num_tokens} tokens"
        self._encoded[item.content_hash] = rows
        while len(self._encoded) > 1 and sum(r.nbytes for r in self._encoded.values()) > self._max_bytes:
            self._encoded.popitem(last=False)
        return rows

    def spans(self, rows: Sequence[StepRow]) -> Spans | None:
        """Of each row, where items lie whose tokens see each other; None: there are none."""
        if not self._model.whole_media:
            return None
        found = [self._row_spans(row) for row in rows]
        return found if any(found) else None

    def _row_spans(self, row: StepRow) -> list[tuple[int, int]]:
        bound = self._bound.get(row.slot)
        if bound is None:
            return []
        stop = row.start + len(row.token_ids or [0])
        spans = [(item.start, item.start + item.num_tokens) for item in bound.items if self._is_whole(item)]
        return [(first, end) for first, end in spans if first < stop and end > row.start]

    def _is_whole(self, item: MediaItem) -> bool:
        return item.kind in self._model.whole_media

    def forward(self, rows: Sequence[StepRow], inputs: mx.array) -> dict[str, mx.array | int]:
        """Embeddings and positions that `rows` need; nothing where none of them has media.

        Args:
            inputs: (B, L) token ids.
        """
        if not any(row.slot in self._bound for row in rows):
            return {}
        given: dict[str, mx.array | int] = {**self._embeddings(rows, inputs)}
        positions = self._positions(rows, inputs.shape[1])
        return given if positions is None else {**given, "positions": positions}

    def _embeddings(self, rows: Sequence[StepRow], inputs: mx.array) -> dict[str, mx.array]:
        """The embeddings of media take the places of the tokens' own."""
        given: dict[str, mx.array] = {}
        for i, row in enumerate(rows):
            bound = self._bound.get(row.slot)
            if bound is None or row.start >= bound.end:
                continue
            stop = row.start + len(row.token_ids or [0])
            for index, item in enumerate(bound.items):
                first, end = max(item.start, row.start), min(item.start + item.num_tokens, stop)
                if first >= end:
                    continue
                media = self.encode(row.slot, index)[:, first - item.start : end - item.start]
                if not given:
                    given["input_embeddings"] = self._model.embed(inputs)
                embeddings = given["input_embeddings"]
                place = slice(first - row.start, end - row.start)
                embeddings[i, place] = media[0].astype(embeddings.dtype)
                if media.shape[0] > 1:
                    shape = (media.shape[0] - 1, *embeddings.shape)
                    deep = given.setdefault("deep_embeddings", mx.zeros(shape, embeddings.dtype))
                    deep[:, i, place] = media[1:].astype(embeddings.dtype)
        return given

    def _positions(self, rows: Sequence[StepRow], width: int) -> mx.array | int | None:
        """(B,), or a number for one row, where every row is behind its media, otherwise (3, B, width)."""
        bounds = [self._bound.get(row.slot) for row in rows]
        if all(b is None or b.positions is None for b in bounds):
            return None
        if all(b is None or row.start >= b.end for row, b in zip(rows, bounds, strict=True)):
            firsts = [row.start + (b.shift if b else 0) for row, b in zip(rows, bounds, strict=True)]
            return firsts[0] if len(firsts) == 1 else mx.array(firsts)  # as the caches' `offset` has it
        positions = np.empty((3, len(rows), width), dtype=np.int32)
        for i, (row, bound) in enumerate(zip(rows, bounds, strict=True)):
            positions[:, i] = np.arange(row.start, row.start + width) + (bound.shift if bound else 0)
            if bound is not None and bound.positions is not None:
                known = bound.positions[:, row.start : row.start + width]
                positions[:, i, : known.shape[1]] = known
        return mx.array(positions)


def _array(tensor: MediaTensor) -> mx.array:
    return mx.array(np.frombuffer(tensor.data, dtype=_DTYPES[tensor.dtype]).reshape(tensor.shape))
