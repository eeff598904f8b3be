"""Puts adapters into a model: around each projection that one of them changes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from shared.errors import BadModel
from workers.adapters.checkpoint import Adapter, read
from workers.adapters.rows import AdaptedLinear, Adapters

_LAYER = re.compile(r"(?:.*?\.)?(\w+\.\d+\..+)")  # "layers.3.self_attn.q_proj" of it
_ENCODER = re.compile(r"vision|visual|audio|image")


def install(model: nn.Module, places: Mapping[str, str], dtype: mx.Dtype) -> Adapters:
    """Wrap the projections. Before anything joins or reads them; the arrays stay lazy.

    Args:
        model: with its weights.
        places: name -> folder or Hugging Face id.
        dtype: of activations.
    Raises:
        BadModel: an adapter cannot be read, or does not fit the model.
    """
    read_adapters = [read(name, place) for name, place in places.items()]
    projections = linears(model)
    pairs = [_by_path(adapter, projections) for adapter in read_adapters]
    ranks = {adapter.name: adapter.rank for adapter in read_adapters}
    adapters = Adapters(ranks, {adapter.name: adapter.fingerprint for adapter in read_adapters})
    wrapped = []
    for path in sorted({path for of_adapter in pairs for path in of_adapter}):
        linear = projections[path]
        size_in, size_out = sizes(linear)
        columns = [
            _padded(of_adapter.get(path), rank, size_in, size_out)
            for of_adapter, rank in zip(pairs, ranks.values(), strict=True)
        ]
        lora_a = mx.concatenate([a for a, _ in columns], axis=1).astype(dtype)
        lora_b = mx.concatenate([b for _, b in columns], axis=0).astype(dtype)
        wrapped.append((path, AdaptedLinear(linear, lora_a, lora_b, adapters)))
    model.update_modules(tree_unflatten(wrapped))
    return adapters


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer of a model by its path."""
    found = model.named_modules()
    return {path: module for path, module in found if isinstance(module, nn.Linear | nn.QuantizedLinear)}


def _by_path(adapter: Adapter, projections: Mapping[str, nn.Module]) -> dict[str, tuple[mx.array, mx.array]]:
    """The pairs by the names that the model's own definition gives to its projections."""
    found: dict[str, tuple[mx.array, mx.array]] = {}
    for key, pair in adapter.pairs.items():
        path = _find(key, projections)
        if path is None:
            raise BadModel(f"adapter {adapter.name!r}: the model has no linear layer {key!r} that could be adapted")
        wanted, given = sizes(projections[path]), (pair[0].shape[0], pair[1].shape[1])
        if wanted != given:
            raise BadModel(
                f"adapter {adapter.name!r}: {key} maps {given[0]} to {given[1]} numbers, the model's {wanted}"
            )
        if path in found:
            raise BadModel(f"adapter {adapter.name!r}: two of its pairs are meant for {path}")
        found[path] = pair
    return found


def _find(key: str, projections: Mapping[str, nn.Module]) -> str | None:
    """A projection of the decoder by its layer's number and its place in it, whatever holds the layers."""
    place = _place(key)
    found = [path for path in projections if place is not None and _place(path) == place]
    return found[0] if len(found) == 1 else None


def _place(path: str) -> str | None:
    """ "layers.3.self_attn.q_proj" of a decoder's projection; None for what is not in a layer, or in an encoder's."""
    match = _LAYER.fullmatch(path)
    return match[1] if match is not None and not _ENCODER.search(path) else None


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a plain or quantised linear layer."""
    rows, columns = linear.weight.shape
    return (columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns), rows


def _padded(
    pair: tuple[mx.array, mx.array] | None, rank: int, size_in: int, size_out: int
) -> tuple[mx.array, mx.array]:
    """As wide as the adapter's columns: zeros add nothing."""
    if pair is None:
        return mx.zeros((size_in, rank)), mx.zeros((rank, size_out))
    a, b = pair
    missing = rank - a.shape[1]
    return mx.pad(a, [(0, 0), (0, missing)]), mx.pad(b, [(0, missing), (0, 0)])
