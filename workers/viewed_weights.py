"""Weights transposed once, not at each call: a view costs a host a microsecond or two, and a layer has four to ten."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from workers.features import TapLayer, block_list
from workers.kv_taps import KVTapLayer
from workers.models.base import TextModel


class ViewedLinear(nn.Linear):
    """A linear layer without bias that keeps its transposed weights, a view of the others."""

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self["_transposed"]


def view_weights(model: TextModel) -> None:
    """Make every plain linear layer of a model such a one. Call when none is joined with another any more."""
    for module in _modules(model):
        if type(module) is nn.Linear and "bias" not in module:
            module._transposed = module.weight.T
            mx.eval(module._transposed)
            module.__class__ = ViewedLinear


def _modules(model: Any) -> Iterator[nn.Module]:  # noqa: ANN401 - a module, or what stands around one of mlx-lm's
    """Also those of blocks that something stands in for, which a model does not find itself."""
    module = model if isinstance(model, nn.Module) else model.model
    yield from module.modules()
    for block in block_list(model) or []:
        while isinstance(block, TapLayer | KVTapLayer):
            block = block._layer
        yield from block.modules()
