"""What tells one Gemma text decoder from another, read from Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import BadModel
from workers.models.rope import RopeParameters, rope_parameters

GEMMA3_TYPES = ("gemma3", "gemma3_text")
GEMMA4_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

SPAN_LAYERS = {"none": (), "sliding": ("sliding_attention",), "all": ("sliding_attention", "full_attention")}
Spans = Literal["none", "sliding", "all"]

DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
DEFAULT_ROPE_GEMMA4 = {
    **DEFAULT_ROPE,
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True)
class LayerShape:
    """One layer. `source` is the layer whose keys and values it reads, None: it writes its own."""

    kind: str  # "sliding_attention" or "full_attention"
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    has_v_proj: bool  # False: values are the keys before their norm
    source: int | None = None


@dataclass(frozen=True)
class ExpertShape:
    num_experts: int
    num_chosen: int
    intermediate_size: int


@dataclass(frozen=True)
class GemmaConfig:
    """A Gemma 3 or Gemma 4 text decoder."""

    model_type: str
    hidden_size: int
    num_heads: int
    vocab_size: int
    rms_norm_eps: float
    layers: tuple[LayerShape, ...]
    window: int
    ropes: dict[str, RopeParameters]  # by layer kind
    attention_scale: float
    has_bias: bool
    softcap: float | None  # of the final logits
    is_tied: bool
    pad_token_id: int
    spans: Spans  # layers in which the tokens of one image see each other
    per_layer_size: int = 0  # width of the per-layer embeddings; 0: none
    per_layer_vocab_size: int = 0
    experts: ExpertShape | None = None
    media_token_ids: tuple[int, ...] = ()  # placeholders, which have no per-layer embedding of their own

    @property
    def is_gemma4(self) -> bool:
        return self.model_type in GEMMA4_TYPES

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """(query heads, key-value heads, head size) of its attention layers."""
        return {(self.num_heads, layer.num_kv_heads, layer.head_dim) for layer in self.layers}

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> GemmaConfig:
        """Read a config.json, of a text model or of a multimodal one (its `text_config`).

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that the decoder does not compute.
        """
        model_type = str(config["model_type"])
        text = {**(config.get("text_config") or config)}
        try:
            return _gemma(cls, model_type, config, text, max_model_len)
        except KeyError as missing:
            raise BadModel(f"{model_type}: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error


def _gemma(
    cls: type[GemmaConfig], model_type: str, config: dict[str, Any], text: dict[str, Any], max_model_len: int
) -> GemmaConfig:
    is_gemma4 = model_type in GEMMA4_TYPES
    activation = text.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise BadModel(f"{model_type}: hidden_activation {activation!r} is not supported")
    is_unified = model_type.startswith("gemma4_unified")
    bidirectional = text.get("use_bidirectional_attention", "vision" if is_unified else None)
    if bidirectional not in (None, False, "vision"):
        raise BadModel(f"{model_type}: use_bidirectional_attention {bidirectional!r} is not supported")
    if text.get("attn_logit_softcapping"):
        raise BadModel(f"{model_type}: attn_logit_softcapping is not supported")
    for name, default in _gemma3_defaults(model_type).items():
        if text.get(name) is None:
            text[name] = default
    layers = _layers(text, is_gemma4)
    spans: Spans = "sliding" if bidirectional == "vision" else "none"
    if model_type == "gemma3" or (is_unified and bidirectional == "vision"):
        spans = "all"
    chosen = text.get("top_k_experts")
    experts = None
    if is_gemma4 and text.get("enable_moe_block"):
        experts = ExpertShape(int(text["num_experts"]), int(chosen or 0), int(text["moe_intermediate_size"]))
        if not 0 < experts.num_chosen <= experts.num_experts:
            raise BadModel(f"{model_type}: {experts.num_chosen} of {experts.num_experts} experts")
    per_layer = int(text.get("hidden_size_per_layer_input") or 0) if is_gemma4 else 0
    scale = 1.0 if is_gemma4 else float(text.get("query_pre_attn_scalar") or 256) ** -0.5
    media = (config.get(f"{kind}_token_id") for kind in ("image", "video", "audio"))
    softcap = text.get("final_logit_softcapping")
    return cls(
        model_type=model_type,
        hidden_size=int(text["hidden_size"]),
        num_heads=int(text["num_attention_heads"]),
        vocab_size=int(text.get("vocab_size") or config["vocab_size"]),
        rms_norm_eps=float(text.get("rms_norm_eps") or 1e-6),
        layers=layers,
        window=int(text["sliding_window"]),
        ropes={
            kind: _rope(text, kind, head_dim, is_gemma4, max_model_len)
            for kind, head_dim in {layer.kind: layer.head_dim for layer in layers}.items()
        },
        attention_scale=scale,
        has_bias=bool(text.get("attention_bias")),
        softcap=float(softcap) if softcap else None,
        is_tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))),
        pad_token_id=int(text.get("pad_token_id") or 0),
        spans=spans,
        per_layer_size=per_layer,
        per_layer_vocab_size=int(text.get("vocab_size_per_layer_input") or 0),
        experts=experts,
        media_token_ids=tuple(int(i) for i in media if i is not None) if "text_config" in config else (),
    )


def _gemma3_defaults(model_type: str) -> dict[str, int]:
    """Gemma 3's multimodal checkpoints leave out what equals transformers' defaults."""
    if model_type not in GEMMA3_TYPES:
        return {}
    return {
        "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "sliding_window": 4096, "query_pre_attn_scalar": 256,
    }  # fmt: skip


def _layers(text: dict[str, Any], is_gemma4: bool) -> tuple[LayerShape, ...]:
    count = int(text["num_hidden_layers"])
    kinds = text.get("layer_types")
    if kinds is None:
        pattern = int(text.get("sliding_window_pattern") or text.get("_sliding_window_pattern") or 6)
        kinds = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    if len(kinds) != count:
        raise BadModel(f"layer_types has {len(kinds)} entries for {count} layers")
    if unknown := set(kinds) - set(DEFAULT_ROPE):
        raise BadModel(f"unknown layer type {sorted(unknown)[0]!r}")
    if is_gemma4:
        kinds = [*kinds[:-1], "full_attention"]  # as transformers does
    first_shared = count - int(text.get("num_kv_shared_layers") or 0) if is_gemma4 else count
    if not 0 < first_shared <= count:
        raise BadModel(f"num_kv_shared_layers {count - first_shared} of {count} layers")
    writers = {kind: i for i, kind in enumerate(kinds[:first_shared])}  # the last one of each kind
    if lacking := set(kinds[first_shared:]) - set(writers):
        raise BadModel(f"num_kv_shared_layers leaves no {sorted(lacking)[0]} layer to read from")
    layers = []
    for i, kind in enumerate(kinds):
        head_dim, num_kv_heads = _heads(text, i, kind, is_gemma4)
        is_shared = i >= first_shared
        is_double = is_shared and bool(text.get("use_double_wide_mlp"))
        shape = LayerShape(
            kind=kind,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            intermediate_size=int(text["intermediate_size"]) * (2 if is_double else 1),
            has_v_proj=not (is_gemma4 and text.get("attention_k_eq_v") and kind == "full_attention"),
            source=writers[kind] if is_shared else None,
        )
        if int(text["num_attention_heads"]) % shape.num_kv_heads or shape.head_dim % 2:
            raise BadModel(f"layer {i}: {text['num_attention_heads']} heads of {head_dim} over {num_kv_heads} kv heads")
        layers.append(shape)
    return tuple(layers)


def _heads(text: dict[str, Any], index: int, kind: str, is_gemma4: bool) -> tuple[int, int]:
    """(head_dim, num_kv_heads) of a layer: Gemma 4's full layers have their own, written in one of two ways."""
    head_dim, num_kv_heads = int(text["head_dim"]), int(text["num_key_value_heads"])
    if not is_gemma4:
        return head_dim, num_kv_heads
    by_layer = text.get("per_layer_config")
    if by_layer is not None:
        own = by_layer.get(str(index)) or {}
        return int(own.get("head_dim") or head_dim), int(own.get("num_key_value_heads") or num_kv_heads)
    if kind == "full_attention":
        head_dim = int(text.get("global_head_dim") or 512)
        if text.get("attention_k_eq_v") and text.get("num_global_key_value_heads"):
            num_kv_heads = int(text["num_global_key_value_heads"])
    return head_dim, num_kv_heads


def _rope(text: dict[str, Any], kind: str, head_dim: int, is_gemma4: bool, max_model_len: int) -> RopeParameters:
    """By layer kind; older Gemma 3 configurations name a base for each and a scaling for full layers."""
    given = text.get("rope_parameters")
    if isinstance(given, dict) and kind in given:
        own = {**DEFAULT_ROPE[kind], **(given[kind] or {})}
    elif is_gemma4:
        own = DEFAULT_ROPE_GEMMA4[kind]
    elif kind == "sliding_attention":
        own = {**DEFAULT_ROPE[kind], "rope_theta": text.get("rope_local_base_freq") or 10_000.0}
    else:
        scaling = text.get("rope_scaling") or {}
        kind_name = scaling.get("rope_type") or scaling.get("type") or "default"
        own = {**scaling, "rope_type": kind_name, "rope_theta": text.get("rope_theta") or 1_000_000.0}
    longest = text.get("max_position_embeddings")
    return rope_parameters({"rope_parameters": own, "max_position_embeddings": longest}, head_dim, max_model_len)
