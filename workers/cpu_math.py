"""Exponentials for the CPU, out of operations that MLX's CPU backend runs as vector code.

On x86 its `exp`, `sigmoid` and `softmax` are scalar code: 7 to 17 ns a value, where sums and products take 0.3 ns. The
power of two below takes 1.3 ns and is nearer to the true value (relative error 2e-7; MLX's exp 1e-6). On an AMD
EPYC, MLX 0.32.4.
"""

from __future__ import annotations

import mlx.core as mx

LOG2_E = 1.4426950408889634
LOWEST = -100.0  # 2 ** LOWEST is nothing beside 1, and its products are no subnormal numbers, which are slow
HIGHEST = 126.0

# 2^f for f in [-0.5, 0.5]: least squares of the relative error, which stays below 1e-7, with 2^0 = 1 exactly.
_COEFFICIENTS = (1.0, 0.693146978, 0.240222421, 0.0555073375, 0.00967151358, 0.00132647283)

# Adding it to a float32 leaves the nearest whole number, plus the exponent's bias, in the lowest bits.
_TO_BITS = 1.5 * 2.0**23 + 127.0
_EXPONENT_SHIFT = 23


def exp2(x: mx.array) -> mx.array:
    """2 ** x for float32 x <= HIGHEST; below LOWEST it is 2 ** LOWEST. NaN stays NaN."""
    x = mx.maximum(x, LOWEST)
    bits = x + _TO_BITS
    fraction = x - (bits - _TO_BITS)
    power = fraction * _COEFFICIENTS[-1] + _COEFFICIENTS[-2]
    for coefficient in _COEFFICIENTS[-3::-1]:
        power = power * fraction + coefficient
    return power * (bits.view(mx.int32) << _EXPONENT_SHIFT).view(mx.float32)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), float32."""
    return x / (1.0 + exp2(mx.minimum(x * -LOG2_E, HIGHEST)))


def softmax(x: mx.array) -> mx.array:
    """Along the last axis, float32. Entries below 2^LOWEST of the largest are exactly 0: what is forbidden stays so."""
    power = (x - mx.max(x, axis=-1, keepdims=True)) * LOG2_E
    mass = mx.where(power < LOWEST, 0.0, exp2(power))
    return mass / mx.sum(mass, axis=-1, keepdims=True)
