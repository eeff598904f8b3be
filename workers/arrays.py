"""MLX's own stubs are looser than what the calls return; these say it once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx


def to_list(array: mx.array) -> list[Any]:
    """Nested lists of numbers. Waits for the device."""
    return cast(list[Any], array.tolist())


def start_evaluating(arrays: Sequence[mx.array]) -> None:
    """Hand the graphs behind `arrays` to the device and return without waiting (on a GPU)."""
    mx.async_eval(list(arrays))  # type: ignore[no-untyped-call]  # MLX's stub
