"""Heads that draft one token at a time, trained on their own outputs ("training-time test").

Step s of a chain is fed the row that step s-1 put out and the document's token; it sees the true pairs before the
anchor and the chain's own earlier steps, just as when it serves. Source: Li et al. 2025, arXiv:2503.01840, section 3.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import mlx.core as mx

from bench.training.attention import attend, context_bias
from bench.training.parts import Batch, Features, LayerMath, Params, Trained, rows_at

LAYER = "layers.0."


@dataclass
class Recursive(Trained):
    num_steps: int = 4

    @property
    def num_predictions(self) -> int:
        return self.num_steps

    @abstractmethod
    def raw(self, features: Features) -> mx.array:
        """The target's rows (B, L, n) that `enter` takes."""

    @abstractmethod
    def enter(self, params: Params, raw: mx.array, dtype: mx.Dtype) -> mx.array:
        """The target's rows (..., n) -> the feature (..., H) of a pair."""

    @abstractmethod
    def combine(self, params: Params, feature: mx.array, embedded: mx.array, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        """(attention input, residual) of pairs."""

    @abstractmethod
    def finish(self, params: Params, h: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Rows (..., H) after attention and feed-forward -> (row for the head, feature of the next step)."""

    def forward(self, params: Params, batch: Batch, features: Features, dtype: mx.Dtype) -> mx.array:
        shape = self.shape
        b, length = batch.tokens.shape
        num_anchors = batch.anchors.shape[1]
        layer = LayerMath(params, LAYER, shape, dtype)
        raw = self.raw(features)
        # Pair i: the feature of position i with the token of position i + 1. The last one is never looked at.
        following = mx.concatenate([batch.tokens[:, 1:], batch.tokens[:, -1:]], axis=1)
        x, _ = self.combine(params, self.enter(params, raw, dtype), self.embedding[following].astype(dtype), dtype)
        context = (layer.heads(x, "k", 0), layer.heads(x, "v", None))
        bias = context_bias(batch.anchors, length, dtype)
        starts = batch.anchors.reshape(-1) - 1
        scale = shape.head_dim**-0.5
        # Gathered before `enter`, so that no gradient has to be scattered back.
        feature = self.enter(params, rows_at(raw, batch.anchors - 1), dtype)
        keys: list[mx.array] = []
        values: list[mx.array] = []
        rows = []
        for step in range(self.num_steps):
            at = mx.minimum(batch.anchors + step, length - 1)
            embedded = self.embedding[mx.take_along_axis(batch.tokens, at, axis=1)].astype(dtype)
            x, residual = self.combine(params, feature, embedded, dtype)
            x = x.reshape(b * num_anchors, 1, -1)
            q = (layer.heads(x, "q", starts + step) * scale).reshape(b, num_anchors, shape.num_heads, 1, -1)
            own = None
            if step:
                keys.append(layer.heads(x, "k", starts + step).reshape(b, num_anchors, shape.num_kv_heads, 1, -1))
                values.append(layer.heads(x, "v", None).reshape(b, num_anchors, shape.num_kv_heads, 1, -1))
                own = (mx.concatenate(keys, axis=3), mx.concatenate(values, axis=3))
            attended = attend(q, context, own, bias, mx.zeros((1, step)) if step else None)
            h = residual + layer.output(attended[:, :, 0])
            h = h + layer.mlp(layer.norm(h, "post_attention_layernorm"))
            row, feature = self.finish(params, h, dtype)
            rows.append(row)
        return mx.stack(rows, axis=2)
