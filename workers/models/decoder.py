"""Llama, Mistral, Ministral 3, Qwen2 and Qwen3: one decoder whose parts are switched by the configuration.

Parameters carry Hugging Face's names. After loading, `fuse` joins q/k/v and, on a GPU, gate/up into one product each.
"""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from shared.errors import BadModel
from workers import cpu_math
from workers.cache.spec import AttentionSpec, LayerSpec
from workers.kernels.choice import Form
from workers.kernels.gate import SiluGate
from workers.models.base import LayerCache, NoCache
from workers.models.fp8 import unpacked
from workers.models.fuse import are_alike, join
from workers.models.lean import LeanLayer
from workers.models.rope import QueryScaling, Rope, RopeParameters, Rotate, rope_parameters

MODEL_TYPES = ("llama", "mistral", "ministral3", "qwen2", "qwen3")

# From this many rows a mean by matrix product beats mx.fast.rms_norm on the CPU: 30 times 256 rows of 576 take 5
# against 14 ms.
MIN_ROWS_FOR_PRODUCT_NORM = 16

MIN_SIZE_FOR_OWN_SILU = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """What tells one model of these families from another. `windows` has one entry per layer, None: full attention."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeParameters
    windows: tuple[int | None, ...]
    has_qkv_bias: bool
    has_o_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    is_tied: bool
    query_scaling: QueryScaling | None = None

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """(query heads, key-value heads, head size) of its attention layers."""
        return {(self.num_heads, self.num_kv_heads, self.head_dim)}

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> DecoderConfig:
        """Read a config.json.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that this decoder does not compute.
        """
        model_type = config.get("model_type", "")
        activation = config.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            raise BadModel(f"{model_type}: hidden_act {activation!r} is not supported")
        try:
            num_heads = int(config["num_attention_heads"])
            head_dim = int(config.get("head_dim") or config["hidden_size"] // num_heads)
            num_layers = int(config["num_hidden_layers"])
            attention_bias = bool(config.get("attention_bias", False))
            made = cls(
                model_type=model_type,
                hidden_size=int(config["hidden_size"]),
                intermediate_size=int(config["intermediate_size"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=head_dim,
                vocab_size=int(config["vocab_size"]),
                rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope=rope_parameters(config, head_dim, max_model_len),
                windows=_windows(config, num_layers),
                has_qkv_bias=attention_bias or model_type == "qwen2",  # Qwen2 has them without saying so
                has_o_bias=attention_bias and model_type != "qwen2",
                has_mlp_bias=bool(config.get("mlp_bias", False)),
                has_qk_norm=model_type == "qwen3",
                is_tied=bool(config.get("tie_word_embeddings", False)),
                query_scaling=QueryScaling.from_hf(config) if model_type == "ministral3" else None,
            )
        except KeyError as missing:
            raise BadModel(f"{model_type}: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error
        if made.num_heads % made.num_kv_heads or made.head_dim % 2:
            raise BadModel(f"{model_type}: {made.num_heads} heads of {made.head_dim} over {made.num_kv_heads} kv heads")
        return made


def _windows(config: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if config["model_type"] in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        window = None
    if window is None:
        return (None,) * num_layers
    layer_types = config.get("layer_types")
    if layer_types is None:
        match config["model_type"]:
            case "mistral" | "ministral3":
                first = 0
            case "qwen2" | "qwen3":
                first = int(config.get("max_window_layers", 28))
            case _:
                first = num_layers
        return tuple(int(window) if i >= first else None for i in range(num_layers))
    if len(layer_types) != num_layers:
        raise BadModel(f"layer_types has {len(layer_types)} entries for {num_layers} layers")
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise BadModel(f"unknown layer type {sorted(unknown)[0]!r}")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)


class Norm(nn.RMSNorm):
    """RMS norm. On the CPU and for many rows the mean of squares is a matrix product with a column of 1/H."""

    def __init__(self, dims: int, eps: float, is_cpu: bool) -> None:
        super().__init__(dims, eps)
        self._mean_column = mx.full((dims, 1), 1.0 / dims, dtype=mx.float32) if is_cpu else None

    def __call__(self, x: mx.array) -> mx.array:
        if self._mean_column is None or x.dtype != mx.float32 or x.size < MIN_ROWS_FOR_PRODUCT_NORM * x.shape[-1]:
            return mx.fast.rms_norm(x, self.weight, self.eps)
        return x * mx.rsqrt(mx.square(x) @ self._mean_column + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, window: int | None, is_cpu: bool) -> None:
        super().__init__()
        self.is_cpu = is_cpu
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.window = window
        self.scale = config.head_dim**-0.5
        hidden, dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * dim, bias=config.has_qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=config.has_qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * dim, bias=config.has_qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * dim, hidden, bias=config.has_o_bias)
        self.has_qk_norm = config.has_qk_norm
        if config.has_qk_norm:
            self.q_norm = nn.RMSNorm(dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(dim, config.rms_norm_eps)

    def __call__(self, x: mx.array, rotate: Rotate, cache: LayerCache, query_scale: mx.array | None = None) -> mx.array:
        """On the CPU q, k and v come from one product and q and k are rotated together: fewer, larger operations.

        On a GPU parts of one array would have to be copied apart for more than one row (H100, 8 rows: 11.2 ms a step
        against 8.2 ms of mlx-lm's separate products).
        """
        batch, length, _ = x.shape
        if not self.is_cpu:
            return self._attend_apart(x, rotate, cache, query_scale)
        num_qk = self.num_heads + self.num_kv_heads
        qkv = self._qkv(x).reshape(batch, length, num_qk + self.num_kv_heads, self.head_dim)
        qk, v = qkv[:, :, :num_qk], qkv[:, :, num_qk:]
        if self.has_qk_norm:
            q, k = self.q_norm(qk[:, :, : self.num_heads]), self.k_norm(qk[:, :, self.num_heads :])
            qk = mx.concatenate([q, k], axis=2)
        qk = rotate(qk)
        q, k = qk[:, :, : self.num_heads], qk[:, :, self.num_heads :]
        if query_scale is not None:
            q = q * query_scale.astype(q.dtype)
        out = cache.attend(q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), self.scale, window=self.window)
        out = out.swapaxes(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        return self.o_proj(out)

    def _attend_apart(self, x: mx.array, rotate: Rotate, cache: LayerCache, query_scale: mx.array | None) -> mx.array:
        batch, length, _ = x.shape
        if "qkv_proj" in self:  # where a kernel reads the parts as they lie
            qkv = self.qkv_proj(x).reshape(batch, length, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
            q, k, v = mx.split(qkv, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        else:
            q = self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim)
            k = self.k_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
            v = self.v_proj(x).reshape(batch, length, self.num_kv_heads, self.head_dim)
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if query_scale is not None:  # turning keeps lengths
            q = q * query_scale.astype(q.dtype)
        q, k, v = q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
        out = cache.attend(q, k, v, self.scale, window=self.window, rotation=rotate)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, self.num_heads * self.head_dim))

    def _qkv(self, x: mx.array) -> mx.array:
        if "qkv_proj" in self:
            return self.qkv_proj(x)
        return mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)

    def fuse(self) -> None:
        if self.is_cpu:
            self.join()

    @property
    def is_joinable(self) -> bool:
        return "qkv_proj" in self or are_alike([self.q_proj, self.k_proj, self.v_proj])

    def join(self) -> None:
        """One product for q, k and v. Nothing where they are one."""
        if "qkv_proj" in self:
            return
        join(self, ["q_proj", "k_proj", "v_proj"], "qkv_proj")


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig, is_cpu: bool) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        self.is_cpu = is_cpu
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_up_proj" in self:
            return self.down_proj(joined_swiglu(self.gate_up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu_on_cpu(gate, up) if self.is_cpu else swiglu(gate, up))

    def fuse(self) -> None:
        """One product on a GPU, where it costs the host 14 us to launch one. On a CPU elementwise work on the halves
        of one array is slower than on two (256 tokens of a 135M-parameter model: 985 ms apart, 1052 ms joined).
        """
        if not self.is_cpu:
            join(self, ["gate_proj", "up_proj"], "gate_up_proj")


@mx.compile
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up in one kernel."""
    return gate * mx.sigmoid(gate) * up


joined_swiglu = SiluGate(swiglu)


def swiglu_on_cpu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up. MLX's sigmoid and tanh are scalar code there: (128, 1536), 30 times, takes 186 ms with sigmoid,
    164 ms with tanh and 38 ms with our own exponential, which is worth its many small operations from 8 rows on.
    """
    if gate.dtype == mx.float32 and gate.size >= MIN_SIZE_FOR_OWN_SILU:
        return cpu_math.silu(gate) * up
    half = gate * 0.5
    return (half * mx.tanh(half) + half) * up


class Layer(nn.Module):
    """`lean` does its work once it is there."""

    lean: LeanLayer | None = None

    def __init__(self, config: DecoderConfig, window: int | None, is_cpu: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, window, is_cpu)
        self.mlp = MLP(config, is_cpu)
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps, is_cpu)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps, is_cpu)

    def __call__(self, x: mx.array, rotate: Rotate, cache: LayerCache, *query_scale: mx.array) -> mx.array:
        if self.lean is not None:
            return self.lean(x, rotate, cache)
        x = x + self.self_attn(self.input_layernorm(x), rotate, cache, *query_scale)
        return x + self.mlp(self.post_attention_layernorm(x))

    def join(self) -> None:
        """For a GPU where attention is a kernel: one product for q, k and v, and few launches around it."""
        self.self_attn.join()
        if "qkv_proj" in self.self_attn:
            norms = self.input_layernorm, self.post_attention_layernorm
            self.lean = LeanLayer(self.self_attn, self.mlp, *norms, joined_swiglu)


class Body(nn.Module):
    """Everything below the head; a module of its own because the parameter names start with `model.`."""

    def __init__(self, config: DecoderConfig, is_cpu: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, window, is_cpu) for window in config.windows]
        self.norm = Norm(config.hidden_size, config.rms_norm_eps, is_cpu)


class Model(nn.Module):
    """A causal language model: `SplitModel` and `TextModel` of workers/models/base.py."""

    packs_rows = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.is_cpu = mx.default_device().type == mx.DeviceType.cpu
        self._rope = Rope(config.rope)
        self.model = Body(config, self.is_cpu)
        if not config.is_tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self) -> list[Layer]:
        return list(self.model.layers)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def layer_specs(self) -> list[LayerSpec]:
        c = self.config
        return [AttentionSpec(c.num_kv_heads, c.head_dim, c.head_dim, window) for window in c.windows]

    def query_heads(self) -> list[int]:
        """Of each layer in `layer_specs`: for models whose attention ends in `cache.attend`."""
        return [self.config.num_heads] * len(self.config.windows)

    def embed(self, inputs: mx.array) -> mx.array:
        return self.model.embed_tokens(inputs)

    def hidden(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        caches: Sequence[LayerCache] = [NoCache()] * len(self.model.layers) if cache is None else cache
        rotate = self._rope.at(caches[0].offset, x.shape[1], x.shape[0], self.is_cpu)
        scaling = self.config.query_scaling
        query_scale = [] if scaling is None else [scaling.at(caches[0].offset, x.shape[1])]
        for layer, layer_cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, rotate, layer_cache, *query_scale)
        return self.model.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        if self.config.is_tied:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def __call__(
        self, inputs: mx.array, cache: Sequence[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        return self.logits(self.hidden(inputs, cache, input_embeddings))

    def tie(self) -> None:
        """The embedding is the head, too: for a checkpoint that holds no other. Call before the weights come in."""
        self.config = replace(self.config, is_tied=True)
        self.pop("lm_head", None)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop what checkpoints carry but the model does not need: stored frequencies, the copy of a tied head."""
        kept = {name: w for name, w in unpacked(weights).items() if not name.endswith("rotary_emb.inv_freq")}
        if "embed_tokens.weight" in kept:  # saved as the bare decoder, as embedding models are
            kept = {f"model.{name}": w for name, w in kept.items()}
        if self.config.is_tied:
            kept = {name: w for name, w in kept.items() if not name.startswith("lm_head.")}
        return kept

    def fuse(self) -> None:
        """Join projections that read the same input. Call once, after the weights are in."""
        for layer in self.model.layers:
            layer.self_attn.fuse()
            if isinstance(layer.mlp, MLP):
                layer.mlp.fuse()

    @property
    def attention_form(self) -> Form:
        """How decode rows come to attention once `join_attention_inputs` was called."""
        c = self.config
        is_plain = c.query_scaling is None and c.rope.attention_factor == 1.0  # else a kernel does not rotate
        if self.is_cpu or not is_plain or not all(layer.self_attn.is_joinable for layer in self.layers):
            return "apart"
        return "normed" if c.has_qk_norm else "joined"

    def join_attention_inputs(self) -> None:
        """One product for q, k and v on a GPU, where attention is a kernel that reads the parts as they lie."""
        form = self.attention_form
        for layer in self.model.layers:
            if form != "apart":
                layer.join()
            elif not self.is_cpu and not layer.self_attn.has_qk_norm:
                layer.self_attn.join()
