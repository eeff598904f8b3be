"""Several projections of one input as one matrix product: fewer launches, and one pass over the input."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn


def fuse_linears(layers: Sequence[nn.Module]) -> nn.Module | None:
    """One layer that returns the outputs of `layers` side by side; None where they differ in kind.

    Plain and quantised linear layers can be joined, since quantisation groups run along the input. The result is
    evaluated, so that the caller can drop the parts one layer at a time and never hold the model twice.
    """
    first = layers[0]
    if type(first) not in (nn.Linear, nn.QuantizedLinear) or any(type(layer) is not type(first) for layer in layers):
        return None
    names = set(first.parameters())
    if any(set(layer.parameters()) != names for layer in layers):
        return None
    if isinstance(first, nn.QuantizedLinear):
        packing = (first.group_size, first.bits, first.mode)
        if any((layer.group_size, layer.bits, layer.mode) != packing for layer in layers):
            return None
        fused: nn.Module = nn.QuantizedLinear.__new__(nn.QuantizedLinear)
        nn.Module.__init__(fused)
        fused.group_size, fused.bits, fused.mode = packing
    else:
        fused = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(fused)
    for name in sorted(names):
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
