"""A counter-based generator: one uniform number for each (seed, position, stream), without state.

The same request gives the same tokens alone, in a batch, after a preemption and after a restart.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFFFFFFFFFF

DRAW = 0  # the token itself
ACCEPT = 1  # rejection sampling: accept the draft?
RESIDUAL = 2  # rejection sampling: the token drawn instead
DRAFT = 3  # the drafter's own draw


def _mix(x: int) -> int:
    """One output of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, position: int, stream: int = DRAW) -> float:
    """A number in [0, 1) with 24 random bits, so that float32 holds it exactly."""
    return (_mix(_mix(_mix(seed & _MASK) ^ position) ^ (stream * 0xD1342543DE82EF95 & _MASK)) >> 40) / (1 << 24)
