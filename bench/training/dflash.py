"""DFlash under training: blocks of [anchor, mask, ...] at random anchors of a document, all in one forward.

Source: Chen et al. 2026, arXiv:2602.06036.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from bench.training.attention import attend, block_bias, context_bias
from bench.training.parts import Batch, Features, LayerMath, Params, Trained, layer_matrices
from bench.training.target import Target


@dataclass
class DFlash(Trained):
    num_layers: int = 4
    block_size: int = 8
    mask_token_id: int = 0
    is_causal: bool = True

    kind = "dflash"

    @property
    def num_predictions(self) -> int:
        return self.block_size - 1

    def matrices(self) -> dict[str, tuple[int, int]]:
        h = self.shape.hidden_size
        found = {"fc.weight": (h, len(self.taps) * h)}
        for i in range(self.num_layers):
            found |= layer_matrices(self.shape, f"layers.{i}.", h)
        return found

    def norms(self) -> dict[str, int]:
        h, d = self.shape.hidden_size, self.shape.head_dim
        found = {"hidden_norm.weight": h, "norm.weight": h}
        for i in range(self.num_layers):
            prefix = f"layers.{i}."
            found |= {prefix + "input_layernorm.weight": h, prefix + "post_attention_layernorm.weight": h}
            found |= {prefix + "self_attn.q_norm.weight": d, prefix + "self_attn.k_norm.weight": d}
        return found

    def warm_start(self, params: Params, target: Target) -> Params:
        """The last blocks of the target, and the last tap handed through to their keys and values.

        The target has no q/k norms: theirs start so that keys and queries keep about the size that trained weights
        give to rows of unit variance.
        """
        first = self.shape.num_target_layers - self.num_layers
        started = dict(params)
        for name in params:
            if not name.startswith("layers."):
                continue
            _, index, rest = name.split(".", 2)
            source = f"layers.{first + int(index)}.{rest}"
            if source in target.weights:
                started[name] = target.weights[source].astype(mx.float32)
        d = self.shape.head_dim
        for i in range(self.num_layers):
            norm = started[f"layers.{i}.input_layernorm.weight"]
            for part in "qk":
                weight = started[f"layers.{i}.self_attn.{part}_proj.weight"] * norm
                size = mx.sqrt(mx.square(weight).sum(axis=1).reshape(-1, d).mean(axis=0))
                half = mx.sqrt((mx.square(size[: d // 2]) + mx.square(size[d // 2 :])) / 2)  # rotated pairs alike
                started[f"layers.{i}.self_attn.{part}_norm.weight"] = mx.concatenate([half, half])
        h, n = self.shape.hidden_size, len(self.taps)
        last = mx.concatenate([mx.zeros((h, (n - 1) * h)), mx.eye(h)], axis=1)
        started["fc.weight"] = last + 0.1 * params["fc.weight"]
        return started

    def forward(self, params: Params, batch: Batch, features: Features, dtype: mx.Dtype) -> mx.array:
        assert features.taps is not None, "DFlash reads taps"
        shape, eps = self.shape, self.shape.rms_norm_eps
        b, length = batch.tokens.shape
        num_anchors, rows = batch.anchors.shape[1], self.block_size
        context = features.taps @ params["fc.weight"].astype(dtype).T
        context = mx.fast.rms_norm(context, params["hidden_norm.weight"].astype(dtype), eps)
        anchor = self.embedding[mx.take_along_axis(batch.tokens, batch.anchors, axis=1)]
        mask = mx.broadcast_to(self.embedding[self.mask_token_id], (b, num_anchors, rows - 1, shape.hidden_size))
        x = mx.concatenate([anchor[:, :, None], mask], axis=2).astype(dtype)
        x = x.reshape(b * num_anchors, rows, shape.hidden_size)
        starts = batch.anchors.reshape(-1)
        bias = context_bias(batch.anchors, length, dtype)
        own_bias = block_bias(rows, self.is_causal)
        scale = shape.head_dim**-0.5
        for i in range(self.num_layers):
            layer = LayerMath(params, f"layers.{i}.", shape, dtype)
            n = layer.norm(x, "input_layernorm")
            q = (layer.heads(n, "q", starts) * scale).reshape(b, num_anchors, shape.num_heads, rows, -1)
            own = tuple(
                layer.heads(n, part, at).reshape(b, num_anchors, shape.num_kv_heads, rows, -1)
                for part, at in (("k", starts), ("v", None))
            )
            seen = (layer.heads(context, "k", 0), layer.heads(context, "v", None))
            attended = attend(q, seen, (own[0], own[1]), bias, own_bias)
            x = x + layer.output(attended.reshape(b * num_anchors, rows, -1))
            x = x + layer.mlp(layer.norm(x, "post_attention_layernorm"))
        x = x.reshape(b, num_anchors, rows, -1)[:, :, 1:]
        return mx.fast.rms_norm(x, params["norm.weight"].astype(dtype), eps)
