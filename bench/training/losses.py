"""The loss through the frozen head, its gradient formed chunk by chunk, so that no chunk's logits outlive it.

Forward KL to the target plus a little cross-entropy on the document's token, each position weighted by how likely a
draft is to get there (D-PACE): with q_j the drafter's probability of token j and q~ = (1-a) q + a,
weight_j = sum over m >= j of the product of q~_1 .. q~_m.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import mlx.core as mx

from bench.training.parts import Batch


@dataclass(frozen=True)
class LossOptions:
    """`cross_entropy`: its share beside the KL; `temperature`: of the teacher; `floor`: a of D-PACE, 1 weighs evenly.

    `rows`: of logits (vocabulary wide) that exist at a time.
    """

    cross_entropy: float = 0.1
    temperature: float = 1.0
    floor: float = 0.5
    rows: int = 4096


def dpace(probability: mx.array, is_valid: mx.array, floor: float | mx.array) -> mx.array:
    """Weights (N, k) of predictions with `probability` (N, k); 0 where not valid."""
    reach = mx.cumprod((1 - floor) * probability + floor, axis=1) * is_valid
    return mx.cumsum(reach, axis=1, reverse=True) * is_valid


@partial(mx.compile, shapeless=False)
def _chunk(
    hidden: mx.array, teacher: mx.array, labels: mx.array, is_valid: mx.array, head: mx.array, knobs: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """(sum of cross-entropies, sum of weights, gradient (N, k, H) before it is normalised, valid rows) of one chunk."""
    share, inverse_temperature, floor = knobs[0], knobs[1], knobs[2]
    logits = hidden @ head.T
    taught = teacher @ head.T
    logits32 = logits.astype(mx.float32)
    lse = mx.logsumexp(logits32, axis=-1, keepdims=True)
    taught32 = taught.astype(mx.float32) * inverse_temperature
    taught_lse = mx.logsumexp(taught32, axis=-1, keepdims=True)
    at_label = mx.take_along_axis(logits, labels[..., None], axis=-1).astype(mx.float32)
    loss = (lse - at_label)[..., 0]
    weight = dpace(mx.exp(-loss), is_valid, floor)
    # d/dlogits of KL + share * CE: (1 + share) q - p - share * onehot(label)
    difference = (1 + share) * mx.exp(logits32 - lse) - mx.exp(taught32 - taught_lse)
    gradient = (difference * weight[..., None]).astype(hidden.dtype) @ head
    gradient = gradient - (share * weight)[..., None].astype(hidden.dtype) * head[labels]
    return (loss * is_valid).sum(), weight.sum(), gradient, is_valid.sum()


def head_gradient(
    hidden: mx.array, teacher: mx.array, labels: mx.array, is_valid: mx.array, head: mx.array, options: LossOptions
) -> tuple[mx.array, mx.array]:
    """(mean cross-entropy of the valid rows, gradient (N, k, H) of the weighted loss).

    The loss is divided by the sum of the weights, which are constants to the gradient.

    Args:
        hidden, teacher: (N, k, H), the drafter's rows and the target's final rows that predict the same tokens.
        labels: (N, k); is_valid: (N, k) float32.
        head: (V, H).
    """
    n, k, _ = hidden.shape
    step = max(1, options.rows // k)
    knobs = mx.array([options.cross_entropy, 1 / options.temperature, options.floor])
    parts = [
        _chunk(hidden[i : i + step], teacher[i : i + step], labels[i : i + step], is_valid[i : i + step], head, knobs)
        for i in range(0, n, step)
    ]
    weight = mx.maximum(sum((p[1] for p in parts), mx.array(0.0)), 1e-6)
    count = mx.maximum(sum((p[3] for p in parts), mx.array(0.0)), 1.0)
    gradient = mx.concatenate([p[2] for p in parts]) * (1 / weight).astype(hidden.dtype)
    return sum((p[0] for p in parts), mx.array(0.0)) / count, gradient


def surrogate(
    rows: mx.array, batch: Batch, final: mx.array, head: mx.array, options: LossOptions
) -> tuple[mx.array, mx.array]:
    """(a scalar whose gradient with respect to `rows` is the loss's, the mean cross-entropy).

    Args:
        rows: (B, A, k, H) of the drafter.
        final: (B, L, H) of the target.
    """
    b, a, k, h = rows.shape
    labels, teacher, is_valid = teaching(batch, final, k)
    flat = mx.stop_gradient(rows).reshape(b * a, k, h)
    loss, gradient = head_gradient(
        flat, teacher.reshape(b * a, k, h), labels.reshape(b * a, k), is_valid.reshape(b * a, k), head, options
    )
    product = rows.reshape(b * a, k, h).astype(mx.float32) * mx.stop_gradient(gradient).astype(mx.float32)
    return product.sum(), mx.stop_gradient(loss)


def teaching(batch: Batch, final: mx.array, k: int) -> tuple[mx.array, mx.array, mx.array]:
    """labels (B, A, k), the target's rows (B, A, k, H) that predict them, is_valid (B, A, k) float32."""
    b, length = batch.tokens.shape
    a = batch.anchors.shape[1]
    at = batch.anchors[..., None] + mx.arange(k)
    predicted = mx.minimum(at + 1, length - 1).reshape(b, a * k)
    labels = mx.take_along_axis(batch.tokens, predicted, axis=1).reshape(b, a, k)
    rows = mx.take_along_axis(final, mx.minimum(at, length - 1).reshape(b, a * k)[..., None], axis=1)
    is_valid = mx.arange(k) < batch.num_valid[..., None]
    return labels, rows.reshape(b, a, k, -1), is_valid.astype(mx.float32)
