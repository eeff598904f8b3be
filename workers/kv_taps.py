"""What a block writes into its cache, kept for a drafter that attends to the target's own keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from shared.errors import BadModel
from workers.features import block_list
from workers.models.base import LayerCache
from workers.models.rope import Rotate, rotated

KeysValues = tuple[mx.array, mx.array]


class RecordingCache:
    """A `LayerCache` that keeps the new rows before it hands them on."""

    def __init__(self, cache: LayerCache) -> None:
        self._cache = cache
        self.kept: KeysValues | None = None

    @property
    def offset(self) -> int | mx.array:
        return self._cache.offset

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
        assert k is not None and v is not None, "a block that writes no keys is tapped for them"
        self.kept = (k if rotation is None else rotated(k, rotation), v)
        # The cache gets them as they came: a kernel rotates on the way.
        return self._cache.attend(q, k, v, scale, window, sinks, rotation, sees_spans)


class KVTapLayer:
    """Stands in for one of our blocks, `block(x, rotation, cache, ...)`, and keeps its keys and values.

    The keys (rotated) and values of each forward go into `sink`, each (B, num_kv_heads, L, dim).
    """

    def __init__(self, layer: Any, sink: dict[int, KeysValues], index: int) -> None:  # noqa: ANN401 - any block
        self._layer = layer
        self._sink = sink
        self._index = index

    def __call__(self, x: mx.array, rotate: Rotate, cache: LayerCache, *more: Any) -> Any:  # noqa: ANN401 - passed on
        recording = RecordingCache(cache)
        out = self._layer(x, rotate, recording, *more)
        assert recording.kept is not None, "a block that did not attend"
        self._sink[self._index] = recording.kept
        return out

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - models look at attributes of their blocks
        return getattr(self._layer, name)


def install_kv_taps(model: Any, layers: Sequence[int]) -> dict[int, KeysValues]:  # noqa: ANN401 - as `install_taps`
    """Wrap these blocks of a decoder of ours; each forward fills the returned dict.

    Raises:
        BadModel: the model has no such blocks.
    """
    blocks = block_list(model)
    if blocks is None or max(layers) >= len(blocks):
        raise BadModel(f"{type(model).__module__} has no blocks {list(layers)} whose keys could be captured")
    sink: dict[int, KeysValues] = {}
    for index in layers:
        blocks[index] = KVTapLayer(blocks[index], sink, index)
    return sink


def as_rows(states: mx.array) -> mx.array:
    """(B, heads, L, dim) -> (B * L, heads * dim)."""
    batch, heads, length, dim = states.shape
    return states.swapaxes(1, 2).reshape(batch * length, heads * dim)
