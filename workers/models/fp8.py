"""Checkpoints with 8-bit floating-point matrices and one scale for each (Ministral 3, Devstral 2), as 16-bit ones."""

from __future__ import annotations

import mlx.core as mx

from shared.errors import BadModel

_SCALE = "_scale_inv"


def unpacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """`x.weight` times `x.weight_scale_inv`, lazily; the scales of activations, which stay 16 bits, are dropped.

    Raises:
        BadModel: scales by blocks.
    """
    scaled = {name.removesuffix(_SCALE) for name in weights if name.endswith(f".weight{_SCALE}")}
    if not scaled:
        return weights
    made = {}
    for name, weight in weights.items():
        if name.endswith((_SCALE, ".activation_scale")):
            continue
        made[name] = _unpacked(name, weight, weights[name + _SCALE]) if name in scaled else weight
    return made


def _unpacked(name: str, weight: mx.array, scale: mx.array) -> mx.array:
    if scale.size != 1 or weight.dtype != mx.uint8:
        raise BadModel(f"{name}: {weight.dtype} with scales {scale.shape} is not supported, only 8 bits with one scale")
    dtype = scale.dtype if scale.dtype in (mx.float16, mx.bfloat16) else mx.bfloat16
    return (mx.from_fp8(weight, mx.float32) * scale.reshape(()).astype(mx.float32)).astype(dtype)
