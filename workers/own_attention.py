"""Whether our attention kernel may serve all of a model, told from its configuration: before MLX's first operation."""

from __future__ import annotations

from typing import Any

from workers.kernels.cuda import supports
from workers.models.own import own_of

SMALLEST_ITEM = 2  # bytes; a decode row of 32-bit floats fits wherever one of 16 bits does


def may_serve_all(config: dict[str, Any]) -> bool:
    """Does the CUDA kernel take the shape of every attention layer? It still has to prove itself there.

    Args:
        config: config.json. False for an architecture that is no definition of our own.
    Raises:
        BadModel: it is one, and cannot be read.
    """
    own = own_of(config)
    if own is None:
        return False
    shapes: set[tuple[int, int, int]] = own.read_config(config, 0).attention_heads
    return all(supports(*shape, SMALLEST_ITEM, rows=1) for shape in shapes)
