"""Attention of many draft chains over one context: the parallel form of what a drafter does step by step.

A chain starts at an anchor. Its rows see the context rows before the anchor, and some of the chain's own rows. Shapes:
B documents, A anchors in each, R query rows and S own rows of a chain, L context rows.
"""

from __future__ import annotations

import mlx.core as mx

OWN_MULTIPLE = 8  # own columns are padded to it, so that rows of scores stay aligned to 16 bytes


def rotate(x: mx.array, offsets: mx.array | int, theta: float) -> mx.array:
    """x (N, heads, rows, dim); row r of entry n turns to position offsets[n] + r."""
    return mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=1.0, offset=offsets)


def attend(
    q: mx.array,
    context: tuple[mx.array, mx.array],
    own: tuple[mx.array, mx.array] | None,
    bias: mx.array,
    own_bias: mx.array | None,
) -> mx.array:
    """Output rows (B, A, R, heads * D).

    Args:
        q: (B, A, heads, R, D), rotated, scaled.
        context: keys (rotated) and values, each (B, kv heads, L, D).
        own: keys (rotated) and values of the chains, each (B, A, kv heads, S, D); None without any.
        bias: (B, 1, A, 1, L), 0 or minus infinity; see `context_bias`.
        own_bias: (R, S), likewise.
    """
    b, a, heads, r, d = q.shape
    keys, values = context
    kv, length = keys.shape[1], keys.shape[2]
    group = heads // kv
    # (B, kv, A, group * R, D): all queries of a key-value head in one product with the context
    q = mx.contiguous(q.reshape(b, a, kv, group * r, d).transpose(0, 2, 1, 3, 4))
    scores = q.reshape(b, kv, a * group * r, d) @ keys.swapaxes(-1, -2)
    scores = scores.reshape(b, kv, a, group * r, length) + bias
    if own is not None and own_bias is not None:
        # Contiguous, so that thousands of small products are one launch.
        own_keys, own_values = (mx.contiguous(_padded(x).transpose(0, 2, 1, 3, 4)) for x in own)
        mine = q @ own_keys.swapaxes(-1, -2)
        missing = own_keys.shape[3] - own_bias.shape[1]
        own_bias = mx.pad(own_bias, [(0, 0), (0, missing)], constant_values=-mx.inf).astype(scores.dtype)
        mine = mine + mx.tile(own_bias, (group, 1))
        scores = mx.concatenate([scores, mine], axis=-1)
    weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights[..., :length].reshape(b, kv, a * group * r, length) @ values
    out = out.reshape(b, kv, a, group * r, d)
    if own is not None:
        out = out + weights[..., length:] @ own_values
    out = out.reshape(b, kv, a, group, r, d).transpose(0, 2, 4, 1, 3, 5)
    return out.reshape(b, a, r, heads * d)


def context_bias(anchors: mx.array, length: int, dtype: mx.Dtype) -> mx.array:
    """(B, 1, A, 1, L): 0 before the anchor, minus infinity from it on. Anchors are at least 1."""
    is_seen = mx.arange(length)[None, None] < anchors[:, :, None]
    return mx.where(is_seen, 0.0, -mx.inf).astype(dtype)[:, None, :, None]


def block_bias(num_rows: int, is_causal: bool) -> mx.array:
    """(R, R) among the rows of one block."""
    j = mx.arange(num_rows)
    is_seen = j[None] <= j[:, None] if is_causal else mx.ones((num_rows, num_rows), dtype=mx.bool_)
    return mx.where(is_seen, 0.0, -mx.inf)


def _padded(x: mx.array) -> mx.array:
    missing = -x.shape[3] % OWN_MULTIPLE
    return mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, missing), (0, 0)]) if missing else x
