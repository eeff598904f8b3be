"""The text decoder of Gemma 3 and Gemma 4, whose parts are switched by the configuration.

Parameters carry the names of mlx-lm's checkpoints, which are Hugging Face's but for the experts. Sliding layers rotate
with one base, full layers with another; the last layers may read keys and values that an earlier layer wrote, and then
have no cache of their own.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from workers.cache.spec import AttentionSpec, LayerSpec
from workers.models.base import LayerCache, NoCache
from workers.models.decoder import Norm
from workers.models.fuse import join
from workers.models.gemma.config import SPAN_LAYERS, GemmaConfig, LayerShape
from workers.models.gemma.experts import Experts, Router
from workers.models.rope import Rope, Rotate

_SHARED_KEYS = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_UNUSED = ("rotary_emb", ".v_norm.", ".embed_scale")


class OffsetNorm(nn.Module):
    """Gemma 3's RMS norm: its weights are stored as their difference from one."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.zeros((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self._scale if "_scale" in self else 1.0 + self.weight, self.eps)

    def fold(self) -> None:
        """Add the one once; call it when the weights are in."""
        self._scale = 1.0 + self.weight
        mx.eval(self._scale)


def make_norm(config: GemmaConfig, dims: int) -> nn.Module:
    if config.is_gemma4:
        return Norm(dims, config.rms_norm_eps, is_cpu=mx.default_device().type == mx.DeviceType.cpu)
    return OffsetNorm(dims, config.rms_norm_eps)


class Attention(nn.Module):
    def __init__(self, config: GemmaConfig, shape: LayerShape) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, shape.num_kv_heads, shape.head_dim
        self.window = config.window if shape.kind == "sliding_attention" else None
        self.scale = config.attention_scale
        self.eps = config.rms_norm_eps
        self.sees_spans = shape.kind in SPAN_LAYERS[config.spans]
        self.writes = shape.source is None
        self.has_v_proj = shape.has_v_proj
        self.has_v_norm = config.is_gemma4
        hidden, bias, kv_width = config.hidden_size, config.has_bias, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * shape.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * shape.head_dim, hidden, bias=bias)
        self.q_norm = make_norm(config, shape.head_dim)
        if self.writes:
            self.k_proj = nn.Linear(hidden, kv_width, bias=bias)
            if shape.has_v_proj:
                self.v_proj = nn.Linear(hidden, kv_width, bias=bias)
            self.k_norm = make_norm(config, shape.head_dim)

    def __call__(self, x: mx.array, rotate: Rotate, cache: LayerCache) -> mx.array:
        batch, length, _ = x.shape
        k: mx.array | None
        v: mx.array | None
        if "qkv_proj" in self:
            q, k, v = self._from_one_product(x)
        else:
            q = self.q_norm(self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim))
            k, v = self._keys_and_values(x) if self.writes else (None, None)
        out = cache.attend(
            q.swapaxes(1, 2), k, v, self.scale, window=self.window, rotation=rotate, sees_spans=self.sees_spans
        )
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, self.num_heads * self.head_dim))

    def _keys_and_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        batch, length, _ = x.shape
        shape = (batch, length, self.num_kv_heads, self.head_dim)
        k = self.k_proj(x).reshape(shape)
        v = self.v_proj(x).reshape(shape) if self.has_v_proj else k
        if self.has_v_norm:
            v = mx.fast.rms_norm(v, None, self.eps)
        return self.k_norm(k).swapaxes(1, 2), v.swapaxes(1, 2)

    def _from_one_product(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        heads = self.qkv_proj(x).reshape(*x.shape[:2], -1, self.head_dim)
        ends = [self.num_heads, self.num_heads + self.num_kv_heads]
        if "_norm_weights" not in self:
            q, k, v = mx.split(heads, ends, axis=2)
            return self.q_norm(q), self.k_norm(k).swapaxes(1, 2), v.swapaxes(1, 2)
        normed = mx.fast.rms_norm(heads, None, self.eps)
        q, k, v = mx.split(normed * self._norm_weights, ends, axis=2)
        if not self.has_v_proj:
            v = normed[:, :, self.num_heads :]
        return q, k.swapaxes(1, 2), v.swapaxes(1, 2)

    def join(self) -> None:
        """One product for q, k and v, and one norm for all heads where values have one: for a GPU."""
        if not self.writes or (not self.has_v_proj and not self.has_v_norm):
            return
        parts = ["q_proj", "k_proj", "v_proj"] if self.has_v_proj else ["q_proj", "k_proj"]
        if join(self, parts, "qkv_proj") and self.has_v_norm:
            counts = [(self.q_norm.weight, self.num_heads), (self.k_norm.weight, self.num_kv_heads)]
            if self.has_v_proj:
                counts.append((mx.ones_like(self.k_norm.weight), self.num_kv_heads))
            self._norm_weights = mx.concatenate([mx.broadcast_to(w, (n, self.head_dim)) for w, n in counts])
            mx.eval(self._norm_weights)


@mx.compile
def gated_gelu(gate: mx.array, x: mx.array) -> mx.array:
    """gelu(gate) * x in one kernel."""
    return nn.gelu_approx(gate) * x


@mx.compile
def scaled_sum(x: mx.array, y: mx.array, scale: mx.array) -> mx.array:
    return (x + y) * scale


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            return self.down_proj(gated_gelu(*mx.split(self.gate_up_proj(x), 2, axis=-1)))
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))

    def join(self) -> None:
        """One product for gate and up: for a GPU."""
        join(self, ["gate_proj", "up_proj"], "gate_up_proj")


class Layer(nn.Module):
    """One block. Its output is one array, so that a drafter's tap can keep it."""

    def __init__(self, config: GemmaConfig, shape: LayerShape) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.self_attn = Attention(config, shape)
        self.mlp = MLP(hidden, shape.intermediate_size)
        self.input_layernorm = make_norm(config, hidden)
        self.post_attention_layernorm = make_norm(config, hidden)
        self.pre_feedforward_layernorm = make_norm(config, hidden)
        self.post_feedforward_layernorm = make_norm(config, hidden)
        self.has_experts = config.experts is not None
        if config.experts is not None:
            self.router = Router(config.experts, hidden, config.rms_norm_eps)
            self.experts = Experts(config.experts, hidden)
            self.post_feedforward_layernorm_1 = make_norm(config, hidden)
            self.post_feedforward_layernorm_2 = make_norm(config, hidden)
            self.pre_feedforward_layernorm_2 = make_norm(config, hidden)
        if config.per_layer_size:
            self.per_layer_input_gate = nn.Linear(hidden, config.per_layer_size, bias=False)
            self.per_layer_projection = nn.Linear(config.per_layer_size, hidden, bias=False)
            self.post_per_layer_input_norm = make_norm(config, hidden)
        self.is_gemma4 = config.is_gemma4
        if self.is_gemma4:
            self.layer_scalar = mx.ones((1,))

    def __call__(
        self, x: mx.array, rotate: Rotate, cache: LayerCache, per_layer_input: mx.array | None = None
    ) -> mx.array:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotate, cache))
        out = self.post_feedforward_layernorm(self._feed_forward(x))
        if per_layer_input is not None:
            x = x + out
            gated = gated_gelu(self.per_layer_input_gate(x), per_layer_input)
            out = self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return scaled_sum(x, out, self.layer_scalar) if self.is_gemma4 else x + out

    def _feed_forward(self, x: mx.array) -> mx.array:
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.has_experts:
            return dense
        chosen, weights = self.router(x)
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), chosen, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(sparse)


class Body(nn.Module):
    """Everything below the head; a module of its own because the parameter names start with `model.`."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, shape) for shape in config.layers]
        self.norm = make_norm(config, config.hidden_size)
        if config.per_layer_size:
            width = len(config.layers) * config.per_layer_size
            self.embed_tokens_per_layer = nn.Embedding(config.per_layer_vocab_size, width)
            self.per_layer_model_projection = nn.Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection_norm = make_norm(config, config.per_layer_size)


class TextDecoder(nn.Module):
    """A causal language model: `SplitModel` and `TextModel` of workers/models/base.py.

    Embeddings, `embed`'s and those given in their place, are scaled already.
    """

    packs_rows = True

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.is_cpu = mx.default_device().type == mx.DeviceType.cpu
        self._ropes = {kind: Rope(parameters) for kind, parameters in config.ropes.items()}
        # Which cache a layer uses: caches are numbered over the layers that write.
        numbers = {layer: n for n, layer in enumerate(i for i, s in enumerate(config.layers) if s.source is None)}
        self._cache_of = [numbers[i if s.source is None else s.source] for i, s in enumerate(config.layers)]
        self.model = Body(config)
        if not config.is_tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def layer_specs(self) -> list[LayerSpec]:
        """Of the layers that write; the others read what those wrote."""
        window = self.config.window
        return [
            AttentionSpec(s.num_kv_heads, s.head_dim, s.head_dim, window if s.kind == "sliding_attention" else None)
            for s in self.config.layers
            if s.source is None
        ]

    def query_heads(self) -> list[int]:
        """Of each layer in `layer_specs`; a layer that reads what it wrote has as many."""
        return [self.config.num_heads] * len(self.layer_specs())

    def shared_layers(self) -> list[int]:
        """Which of `layer_specs` other layers read, too."""
        shapes = self.config.layers
        return sorted({n for n, shape in zip(self._cache_of, shapes, strict=True) if shape.source is not None})

    def embedding_rows(self, inputs: mx.array) -> mx.array:
        """(..., H) as they are stored, for drafters: those scale them themselves."""
        return self.model.embed_tokens(inputs)

    def embed(self, inputs: mx.array) -> mx.array:
        return self.embedding_rows(inputs) * self.config.hidden_size**0.5

    def hidden(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        caches: Sequence[LayerCache] = cache if cache is not None else [NoCache() for _ in self.layer_specs()]
        rotations = {
            kind: rope.at(caches[0].offset, x.shape[1], x.shape[0], self.is_cpu) for kind, rope in self._ropes.items()
        }
        per_layer = self._per_layer_inputs(inputs, x) if self.config.per_layer_size else None
        for i, (layer, shape) in enumerate(zip(self.model.layers, self.config.layers, strict=True)):
            own = per_layer[:, :, i] if per_layer is not None else None
            x = layer(x, rotations[shape.kind], caches[self._cache_of[i]], own)
        return self.model.norm(x)

    def _per_layer_inputs(self, inputs: mx.array, x: mx.array) -> mx.array:
        """(B, L, layers, per_layer_size): what each layer adds for a token, from its id and from its embedding."""
        c = self.config
        if c.media_token_ids:
            is_media = mx.any(inputs[..., None] == mx.array(c.media_token_ids), axis=-1)
            inputs = mx.where(is_media, c.pad_token_id, inputs)
        shape = (*x.shape[:2], len(c.layers), c.per_layer_size)
        by_id = (self.model.embed_tokens_per_layer(inputs) * c.per_layer_size**0.5).reshape(shape)
        by_embedding = (self.model.per_layer_model_projection(x) * c.hidden_size**-0.5).reshape(shape)
        return (self.model.per_layer_projection_norm(by_embedding) + by_id) * 2.0**-0.5

    def uncapped_logits(self, hidden: mx.array) -> mx.array:
        """What the head puts out before the softcap, for drafters."""
        return self.model.embed_tokens.as_linear(hidden) if self.config.is_tied else self.lm_head(hidden)

    def logits(self, hidden: mx.array) -> mx.array:
        logits = self.uncapped_logits(hidden)
        cap = self.config.softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.hidden(inputs, cache, input_embeddings))

    def fuse(self) -> None:
        """Fewer operations for the same numbers. Call once, after the weights are in."""
        for module in self.modules():
            if isinstance(module, OffsetNorm):
                module.fold()
            elif isinstance(module, Attention | MLP) and not self.is_cpu:
                module.join()

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Names as this decoder has them; drops what is stored but not used."""
        kept: dict[str, mx.array] = {}
        for name, weight in weights.items():
            shared = _SHARED_KEYS.search(name)
            if shared and self.config.layers[int(shared[1])].source is not None:
                continue
            if any(part in name for part in _UNUSED) or (self.config.is_tied and name.startswith("lm_head.")):
                continue
            kept[name] = weight
        return split_experts(kept)


def split_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The original checkpoints hold all experts' gates and ups in one array (E, 2F, H), mlx-lm's hold three layers."""
    split: dict[str, mx.array] = {}
    for name, weight in weights.items():
        if name.endswith(".experts.gate_up_proj"):
            gate, up = mx.split(weight, 2, axis=-2)
            base = name.removesuffix("gate_up_proj") + "switch_glu."
            split[base + "gate_proj.weight"], split[base + "up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            split[name.removesuffix("down_proj") + "switch_glu.down_proj.weight"] = weight
        else:
            split[name] = weight
    return split
