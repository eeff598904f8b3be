"""A multi-token-prediction head under training: fc([norm(embedding) ; norm(hidden)]), one block, its row fed back.

The hidden rows are the target's after its final norm, and the row fed back is the head's own after its norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from bench.training.parts import Features, LayerMath, Params, layer_matrices
from bench.training.recursive import LAYER, Recursive
from bench.training.target import Target


@dataclass
class MTP(Recursive):
    num_steps: int = 3

    kind = "mtp"

    def matrices(self) -> dict[str, tuple[int, int]]:
        h = self.shape.hidden_size
        return {"fc.weight": (h, 2 * h), **layer_matrices(self.shape, LAYER, h)}

    def norms(self) -> dict[str, int]:
        names = ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"]
        names += [LAYER + "input_layernorm", LAYER + "post_attention_layernorm"]
        return {f"{name}.weight": self.shape.hidden_size for name in names}

    def warm_start(self, params: Params, target: Target) -> Params:
        """The target's last block; the hidden half of `fc` hands the row through."""
        started = dict(params)
        last = f"layers.{self.shape.num_target_layers - 1}."
        for name in params:
            source = last + name.removeprefix(LAYER)
            if name.startswith(LAYER) and source in target.weights:
                started[name] = target.weights[source].astype(mx.float32)
        h = self.shape.hidden_size
        started["fc.weight"] = mx.concatenate([0.3 * params["fc.weight"][:, :h], mx.eye(h)], axis=1)
        return started

    def raw(self, features: Features) -> mx.array:
        return features.final

    def enter(self, params: Params, raw: mx.array, dtype: mx.Dtype) -> mx.array:
        return raw

    def combine(self, params: Params, feature: mx.array, embedded: mx.array, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        outer = LayerMath(params, "", self.shape, dtype)
        pair = [outer.norm(embedded, "pre_fc_norm_embedding"), outer.norm(feature, "pre_fc_norm_hidden")]
        residual = mx.concatenate(pair, axis=-1) @ outer.weight("fc.weight").T
        return LayerMath(params, LAYER, self.shape, dtype).norm(residual, "input_layernorm"), residual

    def finish(self, params: Params, h: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        row = mx.fast.rms_norm(h, params["norm.weight"].astype(dtype), self.shape.rms_norm_eps)
        return row, row
