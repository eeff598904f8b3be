"""The gated delta rule of Qwen3.5, Qwen3-Next and their like, for many tokens at once.

mlx-lm computes it token after token where it has no kernel: on CUDA and on a CPU. Here CUDA gets a kernel
(workers/kernels/delta.py) and everything else chunks of tokens: within a chunk the rule is a system of equations with
a unit lower triangular matrix (the WY form of Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", 2024; with decay: "Gated Delta Networks", 2025), so that matrix products take the place of steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import gated_delta as mlx_lm_gated_delta

from workers.kernels.delta import CudaDelta, supports

logger = logging.getLogger("target")

CHUNK = 64
BASE = 8  # rows of the triangular matrix that are solved one by one
SMALLEST = 1e-30  # decay; of its logarithm only differences count
TOLERANCE = 1e-3

Rule = Callable[..., tuple[mx.array, mx.array]]
stepwise: Rule = mlx_lm_gated_delta.gated_delta_ops


def chunked(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """The rule for tokens one after another, in chunks.

    Args:
        q, k: (B, L, Hk, Dk), as they are used: normalised and scaled.
        v: (B, L, Hv, Dv), Hv a multiple of Hk.
        g: (B, L, Hv), decay of the state at each token, 0..1.
        beta: (B, L, Hv).
        state: (B, Hv, Dv, Dk), float32.
        mask: (B, L), False: the token is none and changes nothing; its row of y is arbitrary.
    Returns:
        y (B, L, Hv, Dv) in q's type, and the state after.
    """
    batch, length, key_heads, dim = q.shape
    heads, value_dim = v.shape[-2:]
    group = heads // key_heads
    size = min(CHUNK, 1 << (length - 1).bit_length())
    num = -(-length // size)
    if mask is not None:
        beta, g = mx.where(mask[..., None], beta, 0), mx.where(mask[..., None], g, 1)
    padding = [(0, 0), (0, num * size - length), (0, 0)]
    if num * size > length:
        q, k, v = (mx.pad(x, [*padding, (0, 0)]) for x in (q, k, v))
        g, beta = mx.pad(g, padding, constant_values=1), mx.pad(beta, padding)

    # (B, Hk, heads of the group, chunks, tokens of a chunk, ...); q and k are the same for all heads of a group.
    dtype = q.dtype
    q, k = (_split(x, num, key_heads, 1, dim) for x in (q, k))
    v = _split(v, num, key_heads, group, value_dim)
    g, beta = (_split(x, num, key_heads, group, 1) for x in (g, beta))
    logs = mx.cumsum(mx.log(mx.maximum(g, SMALLEST)), axis=-2)
    at = mx.arange(size)
    decay = mx.exp(mx.where(at[:, None] >= at, logs - logs.swapaxes(-1, -2), -mx.inf))  # of token i's share until t
    keys = k.swapaxes(-1, -2)
    system = mx.where(at[:, None] > at, beta * (k @ keys) * decay, 0)
    solved = inverse(system)
    since = mx.exp(logs)  # decay since the chunk's beginning
    until = mx.exp(logs[..., -1:, :] - logs)  # until its end
    # What each token adds is u k^T with u = values - weights S^T, S being the state at the chunk's beginning.
    values, weights = solved @ (beta * v), solved @ (beta * since * k)
    scores = (q @ keys) * decay
    queries, kept, all_of_it = q * since, (k * until).swapaxes(-1, -2), since[..., -1:, :]

    s = state.reshape(batch, key_heads, group, value_dim, dim).swapaxes(-1, -2)
    outputs = []
    for n in range(num):
        u = values[:, :, :, n] - weights[:, :, :, n] @ s
        outputs.append(queries[:, :, :, n] @ s + scores[:, :, :, n] @ u)
        s = all_of_it[:, :, :, n] * s + kept[:, :, :, n] @ u
    y = mx.stack(outputs, axis=3).transpose(0, 3, 4, 1, 2, 5).reshape(batch, num * size, heads, value_dim)
    after = s.swapaxes(-1, -2).reshape(batch, heads, value_dim, dim)
    return y[:, :length].astype(dtype), after


def _split(x: mx.array, num: int, key_heads: int, group: int, dim: int) -> mx.array:
    """(B, L, heads, dim) as (B, key_heads, group, num, L / num, dim) in float32."""
    batch, length = x.shape[:2]
    parts = x.astype(mx.float32).reshape(batch, num, length // num, key_heads, group, dim)
    return parts.transpose(0, 3, 4, 1, 2, 5)


def inverse(a: mx.array) -> mx.array:
    """The inverse of I + a for a strictly lower triangular: (..., C, C), C a power of two.

    Small blocks on the diagonal row by row, then pairs of blocks joined. A product of powers of a would take fewer
    operations, and with keys that are all alike its terms grow to 1e18 and cancel.
    """
    size = a.shape[-1]
    lead = a.shape[:-2]
    base = min(BASE, size)
    blocks = _diagonal(a, base)
    unit = mx.eye(base)
    rows = [mx.broadcast_to(unit[0], blocks.shape[:-1])]
    for i in range(1, base):
        above = mx.stack(rows, axis=-2)
        rows.append(unit[i] - (blocks[..., i, :i, None] * above).sum(axis=-2))
    found = mx.stack(rows, axis=-2)
    while base < size:
        pairs = _diagonal(a, 2 * base)
        first, second = found[..., ::2, :, :], found[..., 1::2, :, :]
        corner = -(second @ pairs[..., base:, :base] @ first)
        upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        found = mx.concatenate([upper, mx.concatenate([corner, second], axis=-1)], axis=-2)
        base *= 2
    return found.reshape(*lead, size, size)


def _diagonal(a: mx.array, base: int) -> mx.array:
    """The blocks (..., C / base, base, base) on the diagonal of a (..., C, C)."""
    num = a.shape[-1] // base
    return mx.stack([a[..., i * base : (i + 1) * base, i * base : (i + 1) * base] for i in range(num)], axis=-3)


class GatedDelta:
    """Takes the place of mlx-lm's loop, with its arguments."""

    def __init__(self, kernel: Rule | None) -> None:
        self._kernel = kernel

    def __call__(
        self, q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array | None = None,
        mask: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        if state is None:
            state = mx.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]), dtype=mx.float32)
        if self._kernel is not None and state.dtype == mx.float32 and supports(k.shape[-1], v.shape[-1]):
            return self._kernel(q, k, v, g, beta, state, mask)
        if g.ndim == 4 or q.shape[1] == 1:
            return stepwise(q, k, v, g, beta, state, mask)
        return chunked(q, k, v, g, beta, state, mask)


def install(*, is_cpu: bool) -> str:
    """Make mlx-lm's models compute the rule so from now on. What computes it, for the log."""
    kernel = None if is_cpu or not mx.cuda.is_available() else _proven_kernel()
    mlx_lm_gated_delta.gated_delta_ops = GatedDelta(kernel)
    if mx.metal.is_available() and not is_cpu:
        return "mlx-lm's Metal kernel"
    return "CUDA kernel" if kernel is not None else f"chunks of {CHUNK} tokens"


def _proven_kernel() -> Rule | None:
    """The CUDA kernel, if it gives what the loop gives on this machine."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    q, k, v, g, beta = (draw(2, 5, *rest) for rest in ((1, 16), (1, 16), (2, 8), (2,), (2,)))
    inputs: list[Any] = [q / 16, k / 4, v, mx.sigmoid(g), mx.sigmoid(beta), draw(2, 2, 8, 16)]
    inputs.append(mx.array([[True] * 5, [True] * 3 + [False] * 2]))
    try:
        kernel = CudaDelta()
        (y, after), (expected, last) = kernel(*inputs), stepwise(*inputs)
        mx.eval(y, after, expected, last)
    except (RuntimeError, ValueError) as error:
        logger.warning("the kernel of the gated delta rule does not run here: %s", str(error)[:300])
        return None
    is_right = mx.allclose(after, last, atol=TOLERANCE) & mx.allclose(y[:, :3], expected[:, :3], atol=TOLERANCE)
    if not is_right.item():
        logger.warning("the kernel of the gated delta rule gives other values here; not used")
        return None
    return kernel
