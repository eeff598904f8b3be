"""A model through its caches as the engine drives it: for comparing with an uncached forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from workers.cache.store import CacheStore
from workers.models.base import TextModel


def cached_logits(
    model: TextModel, tokens: np.ndarray[Any, np.dtype[Any]], is_exact: bool = True
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits (B, n, V) through the cache: row i prefilled to 20 + 3i tokens in two chunks, then all decode together."""
    rows, length = tokens.shape
    store = CacheStore(model.layer_specs(), [64], 32, mx.float32, is_exact)
    logits = np.zeros((rows, length, model.vocab_size), np.float32)

    def forward(slots: Sequence[int], starts: Sequence[int], width: int) -> None:
        batch = store.open(slots, starts, width)
        order = [(slots[i], starts[i]) for i in batch.order]
        out = model(mx.array([tokens[s, p : p + width].tolist() for s, p in order]), cache=batch.layers)
        batch.close()
        for (slot, start), row in zip(order, np.array(out), strict=True):
            logits[slot, start : start + width] = row

    at = [20 + 3 * i for i in range(rows)]
    for slot in range(rows):
        store.ensure(slot, 64)
        forward([slot], [0], 7)
        forward([slot], [7], at[slot] - 7)
    while min(at) < length:
        live = [s for s in range(rows) if at[s] < length]
        forward(live, [at[s] for s in live], 1)
        at = [min(a + 1, length) for a in at]
    return logits
