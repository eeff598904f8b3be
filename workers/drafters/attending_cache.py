"""One sequence's cache of one layer, for a draft model that is a definition of our own: mlx-lm's, with our `attend`."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from workers.cache.spec import AttentionSpec
from workers.models.rope import Rotate, rotated_pair


class AttendingCache(KVCache):  # type: ignore[misc]  # mlx-lm has no annotations
    """Keeps all positions, so that any number of them can be rolled back; a sliding layer's window is in its mask."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self._window = spec.window

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
        """As `KVView.attend`, for text: `sees_spans` has no meaning here."""
        q, k = rotated_pair(q, k, rotation)
        if k is None or v is None:  # another layer wrote this one's rows
            keys, values = self.state
        else:
            keys, values = self.update_and_fetch(k, v)
        mask = _mask(q.shape[2], keys.shape[2], window if window is not None else self._window)
        out: mx.array = mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask, sinks=sinks)
        return out


def _mask(width: int, end: int, window: int | None) -> mx.array | None:
    """Boolean (width, end) for queries at positions end-width .. end-1; None where all is seen."""
    if width == 1 and (window is None or end <= window):
        return None
    queries, keys = mx.arange(end - width, end)[:, None], mx.arange(end)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
