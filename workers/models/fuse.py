"""Several projections of one input as one matrix product: fewer launches, and one pass over the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn


def are_alike(layers: Sequence[nn.Module]) -> bool:
    """Can they be joined?"""
    first = layers[0]
    if type(first) not in (nn.Linear, nn.QuantizedLinear) or any(type(layer) is not type(first) for layer in layers):
        return False
    names = set(first.parameters())
    if any(set(layer.parameters()) != names for layer in layers):
        return False
    if not isinstance(first, nn.QuantizedLinear):
        return True
    packing = (first.group_size, first.bits, first.mode)
    return all((layer.group_size, layer.bits, layer.mode) == packing for layer in layers)


def fuse_linears(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer that returns the outputs of `layers` side by side; None where they differ in kind.

    Plain and quantised linear layers can be joined, since quantisation groups run along the input. The result is
    evaluated, so that the caller can drop the parts one layer at a time and never hold the model twice.
    """
    if not are_alike(layers):
        return None
    first = layers[0]
    kind: Any = type(first)
    fused: nn.Module = kind.__new__(kind)
    nn.Module.__init__(fused)
    if isinstance(first, nn.QuantizedLinear):
        fused.group_size, fused.bits, fused.mode = first.group_size, first.bits, first.mode
    for name in sorted(first.parameters()):
        setattr(fused, name, mx.concatenate([getattr(layer, name) for layer in layers]))
    mx.eval(fused.parameters())
    fused.freeze()
    return fused


def join(module: nn.Module, parts: Sequence[str], joined: str) -> bool:
    """Put one layer, `joined`, in the place of `parts` of a module; False, with nothing changed, as `fuse_linears`."""
    fused = fuse_linears([module[part] for part in parts])
    if fused is None:
        return False
    setattr(module, joined, fused)
    for part in parts:
        delattr(module, part)
    return True
