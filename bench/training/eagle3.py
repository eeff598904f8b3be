"""EAGLE-3 under training: [embedding ; normed feature] in, raw features as the residual, its pre-norm row fed back."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from bench.training.parts import Features, LayerMath, Params, layer_matrices
from bench.training.recursive import LAYER, Recursive
from bench.training.target import Target


@dataclass
class Eagle3(Recursive):
    kind = "eagle3"

    def matrices(self) -> dict[str, tuple[int, int]]:
        h = self.shape.hidden_size
        return {"fc.weight": (h, len(self.taps) * h), **layer_matrices(self.shape, LAYER, 2 * h)}

    def norms(self) -> dict[str, int]:
        names = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        return {"norm.weight": self.shape.hidden_size} | {f"{LAYER}{n}.weight": self.shape.hidden_size for n in names}

    def warm_start(self, params: Params, target: Target) -> Params:
        """The target's last block, reading the feature half of the input; the last tap is the feature."""
        started = dict(params)
        last = f"layers.{self.shape.num_target_layers - 1}."
        h, n = self.shape.hidden_size, len(self.taps)
        for name in params:
            source = last + name.removeprefix(LAYER)
            if not name.startswith(LAYER) or source not in target.weights:
                continue
            weight = target.weights[source].astype(mx.float32)
            if params[name].shape != weight.shape:
                weight = mx.concatenate([0.3 * params[name][:, :h], weight], axis=1)
            started[name] = weight
        started[LAYER + "hidden_norm.weight"] = target.weights[last + "input_layernorm.weight"].astype(mx.float32)
        started[LAYER + "input_layernorm.weight"] = params[LAYER + "input_layernorm.weight"]
        handed = mx.concatenate([mx.zeros((h, (n - 1) * h)), mx.eye(h)], axis=1)
        started["fc.weight"] = handed + 0.1 * params["fc.weight"]
        return started

    def raw(self, features: Features) -> mx.array:
        assert features.taps is not None, "EAGLE-3 reads taps"
        return features.taps

    def enter(self, params: Params, raw: mx.array, dtype: mx.Dtype) -> mx.array:
        return raw @ params["fc.weight"].astype(dtype).T

    def combine(self, params: Params, feature: mx.array, embedded: mx.array, dtype: mx.Dtype) -> tuple[mx.array, ...]:
        layer = LayerMath(params, LAYER, self.shape, dtype)
        pair = [layer.norm(embedded, "input_layernorm"), layer.norm(feature, "hidden_norm")]
        return mx.concatenate(pair, axis=-1), feature

    def finish(self, params: Params, h: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        return mx.fast.rms_norm(h, params["norm.weight"].astype(dtype), self.shape.rms_norm_eps), h
