"""Sampling a token for each of thousands of rows in few passes over their logits.

The inverse of the cumulative distribution in two levels, blocks of tokens and tokens in a block: no random number for
each token of the vocabulary, no sort, no cumulative sum over it.
"""

from __future__ import annotations

import mlx.core as mx

BLOCK = 128


def sample(logits: mx.array, temperatures: mx.array, min_p: float, key: mx.array) -> mx.array:
    """(B,) int32 from logits (B, V); temperature 0 is greedy.

    Args:
        min_p: tokens less likely than this share of the likeliest are left out.
    """
    b, v = logits.shape
    greedy = mx.argmax(logits, axis=-1)
    top = mx.take_along_axis(logits, greedy[:, None], axis=-1).astype(mx.float32)
    inverse = 1 / mx.maximum(temperatures, 1e-4)[:, None]
    scaled = (logits.astype(mx.float32) - top) * inverse
    weights = mx.where(scaled >= mx.log(mx.array(min_p)), mx.exp(scaled), 0.0)
    if v % BLOCK:
        weights = mx.pad(weights, [(0, 0), (0, -v % BLOCK)])
    weights = weights.reshape(b, -1, BLOCK)
    of_blocks = mx.cumsum(weights.sum(axis=-1), axis=-1)  # (B, V / BLOCK)
    wanted = mx.random.uniform(shape=(b, 1), key=key) * of_blocks[:, -1:]
    last = of_blocks.shape[1] - 1
    block = mx.minimum((of_blocks <= wanted).sum(axis=-1), last)
    before = mx.where(block > 0, mx.take_along_axis(of_blocks, mx.maximum(block - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    inside = mx.cumsum(mx.take_along_axis(weights, block[:, None, None], axis=1)[:, 0], axis=-1)
    # Rounding can put the wanted point behind the block's sum: then its last possible token.
    point = mx.minimum((wanted[:, 0] - before)[:, None], inside[:, -1:] * (1 - 1e-6))
    index = (inside <= point).sum(axis=-1)
    drawn = mx.minimum(block * BLOCK + index, v - 1)
    return mx.where(temperatures > 0, drawn, greedy).astype(mx.int32)
