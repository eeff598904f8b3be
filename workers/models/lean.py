"""A decoder layer in as few operations as MLX lets it, for a GPU.

A batch of a few rows waits for the host there: building an operation in Python takes it 0.5 to 2 us, handing one over
4 to 14, and even a view costs a microsecond (H200, MLX 0.32.4, `bench.host_costs`). So weights are transposed once,
residuals are added by the product before them, and attention takes one product's rows as they lie.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from workers.kernels.base import HeadNorms
from workers.kernels.reference import apart
from workers.models.base import LayerCache
from workers.models.rope import Rotate

Product = Callable[[mx.array], mx.array]
AddingProduct = Callable[[mx.array, mx.array], mx.array]


def product(layer: nn.Module) -> Product:
    """`layer` as a function."""
    if type(layer) is not nn.Linear:
        return layer
    weight = layer.weight.T
    mx.eval(weight)
    if "bias" not in layer:
        return lambda x: x @ weight
    bias = layer.bias
    return lambda x: mx.addmm(bias, x, weight)


def adding_product(layer: nn.Module) -> AddingProduct:
    """(residual, x) -> residual + layer(x)."""
    if type(layer) is not nn.Linear or "bias" in layer:
        return lambda residual, x: residual + layer(x)
    weight = layer.weight.T
    mx.eval(weight)
    size = weight.shape[0]

    def add(residual: mx.array, x: mx.array) -> mx.array:
        if x.size == size:  # of one row: matrix times vector is a cheaper launch, and knows no third operand
            return residual + x @ weight
        return mx.addmm(residual, x, weight)

    return add


class LeanLayer:
    """A layer of workers/models/decoder.py whose queries, keys and values are one product.

    Args:
        attention: with `qkv_proj`.
        mlp: with `gate_up_proj`, or called as it is.
        before_attention, before_mlp: the RMS norms.
        activation: of the rows that the gate and up projections made as one product.
    """

    def __init__(
        self,
        attention: nn.Module,
        mlp: nn.Module,
        before_attention: nn.Module,
        before_mlp: nn.Module,
        activation: Callable[[mx.array], mx.array],
    ) -> None:
        self._num_heads, self._num_kv_heads = attention.num_heads, attention.num_kv_heads
        self._scale, self._window = attention.scale, attention.window
        self._norms = None
        if attention.has_qk_norm:
            self._norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
        self._qkv, self._add_attended = product(attention.qkv_proj), adding_product(attention.o_proj)
        self._first, self._second = before_attention.weight, before_mlp.weight
        self._eps = before_attention.eps
        self._activation = activation
        self._gate_up: Product | None = None
        self._add_down: AddingProduct = lambda residual, x: residual + mlp(x)
        if "gate_up_proj" in mlp:
            self._gate_up, self._add_down = product(mlp.gate_up_proj), adding_product(mlp.down_proj)

    def __call__(self, x: mx.array, rotate: Rotate, cache: LayerCache) -> mx.array:
        qkv = self._qkv(mx.fast.rms_norm(x, self._first, self._eps))
        x = self._add_attended(x, self._attend(qkv, rotate, cache))
        inner = mx.fast.rms_norm(x, self._second, self._eps)
        if self._gate_up is not None:
            inner = self._activation(self._gate_up(inner))
        return self._add_down(x, inner)

    def _attend(self, qkv: mx.array, rotate: Rotate, cache: LayerCache) -> mx.array:
        attend_joined = getattr(cache, "attend_joined", None)
        if attend_joined is not None:
            out: mx.array | None = attend_joined(qkv, self._num_heads, self._scale, self._window, rotate, self._norms)
            if out is not None:
                return out
        q, k, v = apart(qkv, self._num_heads, self._num_kv_heads, self._norms)
        out = cache.attend(q, k, v, self._scale, window=self._window, rotation=rotate)
        return out.swapaxes(1, 2).reshape(*qkv.shape[:2], -1)
