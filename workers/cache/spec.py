"""What a layer needs from the cache, as a model reports it by `layer_specs()`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """Keys (num_kv_heads, n, key_dim) and values (num_kv_heads, n, value_dim); the last `window` positions, or all."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def row_elements(self) -> int:
        """Elements of one token's key and value."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class RecurrentSpec:
    """A state of `num_arrays` arrays, each (1, ...) for one sequence, whose size does not grow with the sequence."""

    num_arrays: int


@dataclass(frozen=True)
class ListSpec:
    """A layer with several caches, indexed in order (mlx-lm's CacheList)."""

    children: tuple[AttentionSpec | RecurrentSpec, ...]


LeafSpec = AttentionSpec | RecurrentSpec
LayerSpec = AttentionSpec | RecurrentSpec | ListSpec


def leaves(specs: list[LayerSpec]) -> list[LeafSpec]:
    """All leaf specs, depth first."""
    flat: list[LeafSpec] = []
    for spec in specs:
        flat += list(spec.children) if isinstance(spec, ListSpec) else [spec]
    return flat
