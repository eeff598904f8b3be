"""LFM2's attention layers: mlx-lm's modules with a forward that ends in `cache.attend`, so that our kernels serve."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import lfm2

from workers.machine import is_cpu
from workers.models.rope import Rope, plain_rope


class Attention(lfm2.Attention):
    own_rope: Rope

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:  # noqa: ANN401 - mlx-lm's
        if not hasattr(cache, "attend"):
            return super().__call__(x, mask, cache)
        batch, length, _ = x.shape
        q, k, v = (
            projection(x).reshape(batch, length, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_layernorm(q).swapaxes(1, 2), self.k_layernorm(k).swapaxes(1, 2)
        rotation = self.own_rope.at(cache.offset, length, batch, is_cpu())
        out = cache.attend(q, k, v.swapaxes(1, 2), self.scale, rotation=rotation)
        return self.out_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


def install(model: nn.Module) -> None:
    """Give the attention layers of a model of mlx-lm's `lfm2` the forward of this file."""
    for layer in model.layers:
        if layer.is_attention_layer:
            rope = plain_rope(layer.self_attn.rope)
            assert rope is not None, "mlx-lm's LFM2 knows no other rotation"
            layer.self_attn.__class__ = Attention
            layer.self_attn.own_rope = rope


def query_heads(model: nn.Module) -> list[int]:
    """Of each attention layer."""
    return [layer.self_attn.n_heads for layer in model.layers if layer.is_attention_layer]
