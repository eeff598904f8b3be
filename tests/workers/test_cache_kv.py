"""KV views against attention over plain lists, through writes, roll-backs, swaps, class moves and ring wraps."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random

import mlx.core as mx
import numpy as np
import pytest

from tests.support.layouts import ALL_LAYOUTS, PAGES, store_of
from workers.cache.spec import AttentionSpec
from workers.cache.store import CacheStore
from workers.models.rope import Rope, RopeParameters

pytestmark = pytest.mark.mlx

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 6, 5
MAX_WIDTH = 8
LIMIT = 150


def naive(q, keys, values, start, window):
    """q (heads, L, DIM) at positions start..; keys (KV_HEADS, n, DIM) of all positions; (heads, L, value_dim)."""
    out = np.zeros((HEADS, q.shape[1], values.shape[-1]))
    for head in range(HEADS):
        k, v = keys[head * KV_HEADS // HEADS], values[head * KV_HEADS // HEADS]
        for i in range(q.shape[1]):
            first = 0 if window is None else max(0, start + i - window + 1)
            scores = k[first : start + i + 1] @ q[head, i] * DIM**-0.5
            p = np.exp(scores - scores.max())
            out[head, i] = (p / p.sum()) @ v[first : start + i + 1]
    return out


def through_mlx_lm(view, q, k, v):
    """The same by the protocol of mlx-lm's models."""
    mask = view.make_mask(q.shape[2])
    keys, values = view.update_and_fetch(k, v)
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=DIM**-0.5, mask=mask)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("protocol", ["attend", "mlx-lm"])
@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("window", [None, 9])
def test_every_row_attends_to_its_own_committed_positions(window, is_exact, protocol, layout):
    rng, choose = np.random.default_rng(0), random.Random(window or 0)
    value_dim = DIM if layout == PAGES else VALUE_DIM  # kernels take one size
    specs = [AttentionSpec(KV_HEADS, DIM, value_dim, window)]
    store = store_of(layout, specs, [16, 64, 160], MAX_WIDTH, is_exact, block_size=4)
    texts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    num_rows, num_wrapped = 0, 0
    for _ in range(160):
        if choose.random() < 0.25 and len(texts) < 6:
            texts.setdefault(choose.randrange(7), (np.zeros((KV_HEADS, 0, DIM)), np.zeros((KV_HEADS, 0, value_dim))))
        for slot in [s for s, (k, _) in texts.items() if k.shape[1] > LIMIT - MAX_WIDTH or choose.random() < 0.01]:
            del texts[slot]
            if slot in store.placement:
                store.release(slot)
        slots = [s for s in texts if choose.random() < 0.8]
        if not slots:
            continue
        choose.shuffle(slots)
        width = choose.choice([1, 1, 3, MAX_WIDTH])
        starts = [texts[s][0].shape[1] for s in slots]
        for slot, start in zip(slots, starts, strict=True):
            store.ensure(slot, start + width)
        batch = store.open(slots, starts, width)
        q, k, v = (
            rng.standard_normal((len(slots), heads, width, dim)).astype(np.float32)
            for heads, dim in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, value_dim))
        )
        ordered = [mx.array(array[batch.order]) for array in (q, k, v)]
        view = batch.layers[0]
        out = view.attend(*ordered, scale=DIM**-0.5) if protocol == "attend" else through_mlx_lm(view, *ordered)
        batch.close()
        for at, i in enumerate(batch.order):
            slot, start = slots[i], starts[i]
            keys = np.concatenate([texts[slot][0], k[i]], axis=1)
            values = np.concatenate([texts[slot][1], v[i]], axis=1)
            np.testing.assert_allclose(np.array(out[at]), naive(q[i], keys, values, start, window), atol=2e-5)
            kept = start + choose.randint(1, width)  # the rest is rolled back
            texts[slot] = keys[:, :kept], values[:, :kept]
            num_rows += 1
            num_wrapped += kept > 64
        store.placement.check_integrity()
    assert num_rows > 200
    assert num_wrapped > 20


def test_a_kernel_rotates_by_the_positions_in_the_cache_and_no_others():
    """Rows behind an image have other positions. A lone row's position is an array then, which nobody waits for."""
    store = CacheStore([AttentionSpec(KV_HEADS, DIM, DIM)], [64], MAX_WIDTH, mx.float32, True)
    rope = Rope(RopeParameters((1.0, 0.5, 0.1)))

    def is_for_kernel(view, offset):
        return view._is_plain(rope.at(offset, 1, 1, is_cpu=False))

    for slot in (0, 1):
        store.ensure(slot, 64)
    alone = store.open([0], [5], 1)
    (view,) = alone.layers
    assert is_for_kernel(view, 5)
    assert not is_for_kernel(view, 3)
    assert not is_for_kernel(view, mx.array([5]))
    alone.close()
    (view,) = store.open([0, 1], [5, 7], 1).layers
    assert is_for_kernel(view, view.offset)
    assert not is_for_kernel(view, mx.array([5, 4]))
