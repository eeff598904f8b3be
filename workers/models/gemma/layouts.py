"""Convolution weights as MLX has them, channels last, whichever way a checkpoint holds them."""

from __future__ import annotations

import mlx.core as mx


def channels_last(weights: dict[str, mx.array], expected: dict[str, mx.array]) -> dict[str, mx.array]:
    """PyTorch's (out, in, ...) to MLX's (out, ..., in), for all convolutions of an encoder or for none.

    Args:
        expected: parameters of the encoder, by the same names. A kernel of 3 x 3 over 3 channels tells nothing by its
            shape; the others of its checkpoint tell for it.
    """
    convolutions = [n for n, w in weights.items() if w.ndim in (3, 4) and n in expected and n.endswith(".weight")]
    is_torch = any(
        weights[n].shape != expected[n].shape and _last(weights[n]).shape == expected[n].shape for n in convolutions
    )
    return weights | {n: _last(weights[n]) for n in convolutions} if is_torch else weights


def _last(weight: mx.array) -> mx.array:
    return mx.moveaxis(weight, 1, -1)
