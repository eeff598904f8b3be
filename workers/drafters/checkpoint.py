"""What kind of drafter a folder holds, told from its architecture, its config's sections and its tensors.

Never from `model_type`: a DFlash drafter calls itself "qwen3", an EAGLE-3 drafter "llama"; only Gemma 4's assistant has
one of its own. Tap ids come in two conventions. z-lab's `target_layer_ids` name the block after which the feature is
taken; EAGLE's and Speculators' `*_hidden_state_layer_ids` name the block before which it is taken and are one larger.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import BadModel
from workers.drafters import assistant
from workers.drafters.config import KINDS, DrafterConfig, Kind
from workers.drafters.tensors import TensorIndex
from workers.models.rope import rope_parameters

MAX_RECURSIVE_TOKENS = 8  # a recursive head has no limit of its own; acceptance is near nothing beyond
MAX_MODEL_TOKENS = 16

Config = Mapping[str, Any]


def detect(folder: Path, target: Config | None = None, kind: str | None = None) -> DrafterConfig:
    """Describe the drafter in `folder`.

    Args:
        folder: config.json and *.safetensors; or a .gguf file, which can only be a causal language model.
        target: the target's config.json, for what some checkpoints leave out (default taps, Gemma's embedding scale,
            whether an MTP head beside a whole model is meant).
        kind: what the user says it is; None to find out.
    Raises:
        BadModel: not a drafter, or one of a form that is not supported.
    """
    if kind is not None and kind not in KINDS:
        raise BadModel(f"draft kind {kind!r} is not one of {', '.join(KINDS)}")
    if folder.suffix == ".gguf":
        return DrafterConfig(kind="model", path=folder, max_draft_tokens=MAX_MODEL_TOKENS)
    config = _read_config(folder)
    index = TensorIndex(folder)
    found = _kind(config, index, target, folder) if kind is None else kind
    if found == "mtp" and _is_assistant(config):
        found = "assistant"  # under the name that other servers know it by
    match found:
        case "dflash":
            return _dflash(folder, config, index, target)
        case "eagle3":
            return _eagle3(folder, config, index, target)
        case "mtp":
            return _mtp(folder, config, index)
        case "assistant":
            return assistant.describe(folder, config, target, MAX_RECURSIVE_TOKENS)
        case _:
            return DrafterConfig(kind="model", path=folder, max_draft_tokens=MAX_MODEL_TOKENS)


def _is_assistant(config: Config) -> bool:
    return "assistant" in str(config.get("model_type", ""))


def _kind(config: Config, index: TensorIndex, target: Config | None, folder: Path) -> Kind:
    architectures = " ".join(config.get("architectures") or [])
    if _is_assistant(config):
        return "assistant"
    speculators = config.get("speculators_model_type")
    if speculators is not None:
        if speculators in ("dflash", "dspark"):
            return "dflash"
        if speculators == "eagle3":
            return "eagle3"
        raise BadModel(f"{folder} is a Speculators {speculators!r} drafter; dflash, dspark and eagle3 are supported")
    if "dflash_config" in config or any(a in architectures for a in ("DFlash", "DSpark")):
        return "dflash"
    if "markov_head.markov_w1.weight" in index.normalised("dflash"):
        return "dflash"
    if "Eagle3" in architectures or any(name.startswith(("midlayer.", "model.midlayer.")) for name in index.shapes):
        return "eagle3"
    if index.has_mtp():
        is_beside_model = index.has_base_model()
        if not is_beside_model or (target is not None and _section(target).get("hidden_size") == _hidden_size(config)):
            return "mtp"
    if index.has_base_model():
        return "model"
    raise BadModel(f"{folder} is no drafter that is known: architectures {architectures or 'none'}")


# ---------------------------------------------------------------- the kinds


def _dflash(folder: Path, config: Config, index: TensorIndex, target: Config | None) -> DrafterConfig:
    body, extra = _section(config), config.get("dflash_config") or {}
    is_speculators = "speculators_model_type" in config
    names = index.normalised("dflash")
    _require(folder, "dflash", names, ["fc.weight", "hidden_norm.weight", "norm.weight"])
    _refuse(folder, config, extra, body)
    if is_speculators:
        layer_ids = _first(config, extra, "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
        taps = None if layer_ids is None else tuple(int(i) - 1 for i in layer_ids)
    else:
        layer_ids = _first(extra, config, "target_layer_ids")
        taps = None if layer_ids is None else tuple(int(i) for i in layer_ids)
    if not taps:
        raise BadModel(f"{folder}: config.json names no target layers for a DFlash drafter")
    block_size = _first(config, extra, "block_size")
    mask_token_id = _first(extra, config, "mask_token_id")
    if block_size is None or mask_token_id is None:
        raise BadModel(f"{folder}: config.json lacks block_size or mask_token_id")
    num_layers = int(body["num_hidden_layers"])
    windows, kinds = _windows(folder, config, body, extra, num_layers)
    is_dspark = "markov_head.markov_w1.weight" in names
    first_row = 0 if _is_anchor_sampled(config, extra, is_dspark, int(block_size)) else 1
    has_conv = "layers.0.attention_conv.base_kernel" in names
    has_selector = "candidate_selector.predecessor_codebook" in names
    if "DFlash2" in " ".join(config.get("architectures") or []) and not (has_conv and has_selector):
        raise BadModel(f"{folder} is a DFlash 2 drafter without its convolution or candidate selector")
    return DrafterConfig(
        **_common(folder, "dflash", config, body, names, index),
        max_draft_tokens=int(block_size) - first_row,
        feature="taps",
        taps=_checked_taps(folder, taps, index.shapes[names["fc.weight"]], target),
        embedding_scale=_embedding_scale(config, extra, body, target),
        logit_multiplier=float(_first(extra, config, "output_multiplier") or 1.0),
        logit_softcap=_first(config, extra, "final_logit_softcapping"),
        block_size=int(block_size),
        mask_token_id=int(mask_token_id),
        is_anchor_sampled=first_row == 0,
        causal_layers=_causal_layers(config, extra, kinds, is_dspark),
        windows=windows,
        markov_rank=index.shapes[names["markov_head.markov_w1.weight"]][1] if is_dspark else 0,
        has_confidence="confidence_head.proj.weight" in names,
        is_confidence_fed_markov="confidence_head.proj.weight" in names
        and index.shapes[names["confidence_head.proj.weight"]][1] > int(body["hidden_size"]),
        conv_num_taps=index.shapes[names["layers.0.attention_conv.base_kernel"]][1] if has_conv else 0,
        conv_group_size=int(extra.get("conv_group_size") or 16) if has_conv else 0,
        selector_rank=index.shapes[names["candidate_selector.predecessor_codebook"]][1] if has_selector else 0,
        selector_top_k=int(extra.get("selector_top_k") or 16) if has_selector else 0,
    )


def _eagle3(folder: Path, config: Config, index: TensorIndex, target: Config | None) -> DrafterConfig:
    body, extra = _section(config), config.get("eagle_config") or {}
    names = index.normalised("eagle3")
    layer = [f"layers.0.{n}.weight" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")]
    _require(folder, "eagle3", names, ["fc.weight", "norm.weight", *layer])
    if any(name.startswith("layers.1.") for name in names):
        raise BadModel(f"{folder}: an EAGLE-3 drafter with more than one layer is not supported")
    _refuse(folder, config, extra, body)
    _refuse_unknown_eagle3(folder, config, names)
    layer_ids = _first(config, extra, "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
    if layer_ids is None:
        n = _first(_section(target or {}), config, "num_hidden_layers" if target else "num_target_layers")
        if n is None:
            raise BadModel(f"{folder}: config.json names no target layers and the target's depth is not known")
        layer_ids = [2, int(n) // 2, int(n) - 3]
    taps = tuple(int(i) - 1 for i in layer_ids)
    common = _common(folder, "eagle3", config, body, names, index)
    if common["draft_vocab_size"] != common["vocab_size"] and not {"d2t", "lm_head.weight"} <= set(names):
        raise BadModel(f"{folder}: a reduced draft vocabulary needs d2t and lm_head in the checkpoint")
    num_proposed = _proposed_tokens(config)
    return DrafterConfig(
        **common,
        max_draft_tokens=max(num_proposed or 0, MAX_RECURSIVE_TOKENS),
        feature="taps",
        taps=_checked_taps(folder, taps, index.shapes[names["fc.weight"]], target),
        norm_before_residual=bool(config.get("norm_before_residual", False)),
        norm_output=bool(config.get("norm_output", False)),
    )


def _mtp(folder: Path, config: Config, index: TensorIndex) -> DrafterConfig:
    body = _section(config)
    names = index.normalised("mtp")
    has_experts = f"{_MTP_MLP}gate.weight" in names
    needed = [f"{n}.weight" for n in ("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")]
    _require(folder, "mtp", names, needed + ([] if has_experts else [f"{_MTP_MLP}up_proj.weight"]))
    if any(name.startswith("layers.1.") for name in names):
        raise BadModel(f"{folder}: an MTP head with more than one layer is not supported")
    common = _common(folder, "mtp", config, body, names, index)
    is_gated = _rows(index, names["layers.0.self_attn.q_proj.weight"]) == 2 * common["num_heads"] * common["head_dim"]
    return DrafterConfig(
        **common,
        max_draft_tokens=MAX_RECURSIVE_TOKENS,
        feature="final_hidden",
        has_zero_centred_norms=is_gated and not index.is_mlx,
        **_axes(folder, body, common["rope_dims"]),
        **(_experts(folder, body, names, index) if has_experts else {}),
    )


def _axes(folder: Path, body: Config, rope_dims: int) -> dict[str, Any]:
    """The fields of a head whose target counts positions on three axes."""
    rope = {**(body.get("rope_parameters") or body.get("rope_scaling") or {}), "partial_rotary_factor": None}
    sections = rope.get("mrope_section")
    if not sections:
        return {}
    if len(sections) != 3:
        raise BadModel(f"{folder}: mrope_section {sections} is not one number for each of three axes")
    plain = {**body, "rope_parameters": rope, "partial_rotary_factor": None}
    return {"rope_sections": tuple(int(n) for n in sections), "axial_rope": rope_parameters(plain, rope_dims, 0)}


_MTP_MLP = "layers.0.mlp."


def _experts(folder: Path, body: Config, names: Mapping[str, str], index: TensorIndex) -> dict[str, Any]:
    """The fields of an MTP head with experts, which are fused, split or stored one by one."""
    num_experts, num_chosen = index.shapes[names[f"{_MTP_MLP}gate.weight"]][0], int(body.get("num_experts_per_tok", 0))
    if not 0 < num_chosen <= num_experts:
        raise BadModel(f"{folder}: {num_chosen} of {num_experts} experts")
    if not body.get("norm_topk_prob", True):
        raise BadModel(f"{folder}: an MTP head with norm_topk_prob false is not supported")
    projections = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    if any(name.startswith(f"{_MTP_MLP}switch_mlp.") for name in names):
        needed = [f"switch_mlp.{name}" for name in projections]
    elif any(name.startswith(f"{_MTP_MLP}experts.0.") for name in names):
        needed = [f"experts.{i}.{name}" for i in range(num_experts) for name in projections]
    else:
        needed = ["experts.gate_up_proj", "experts.down_proj"]
    has_shared = bool(body.get("shared_expert_intermediate_size"))
    if has_shared:
        needed += ["shared_expert_gate.weight", *(f"shared_expert.{name}" for name in projections)]
    _require(folder, "mtp", names, [_MTP_MLP + name for name in needed])
    return {"num_chosen_experts": num_chosen, "has_shared_expert": has_shared}


# ---------------------------------------------------------------- parts of a config


def _common(
    folder: Path, kind: Kind, config: Config, body: Config, names: Mapping[str, str], index: TensorIndex
) -> dict[str, Any]:
    """The fields that every kind fills in the same way."""
    try:
        hidden_size, num_heads = int(body["hidden_size"]), int(body["num_attention_heads"])
        vocab_size = int(body["vocab_size"])
        num_layers = 1 if kind in ("mtp", "eagle3") else int(body["num_hidden_layers"])
    except KeyError as error:
        raise BadModel(f"{folder}: config.json lacks {error}") from error
    activation = body.get("hidden_act", body.get("hidden_activation", "silu"))
    if activation not in ("silu", "swish"):
        raise BadModel(f"{folder}: activation {activation!r} is not supported in a drafter")
    head_dim = int(body.get("head_dim") or hidden_size // num_heads)
    rope: Config = body.get("rope_parameters") or {}
    scaling = body.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    is_gated = kind == "mtp" and _rows(index, names["layers.0.self_attn.q_proj.weight"]) == 2 * num_heads * head_dim
    partial = float(rope.get("partial_rotary_factor", body.get("partial_rotary_factor", 1.0))) if is_gated else 1.0
    draft_vocab_size = config.get("draft_vocab_size") or vocab_size
    return {
        "kind": kind,
        "path": folder,
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": int(body.get("num_key_value_heads") or num_heads),
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "draft_vocab_size": int(draft_vocab_size),
        "rms_norm_eps": float(body.get("rms_norm_eps", 1e-6)),
        "rope_theta": float(rope.get("rope_theta", body.get("rope_theta", 10_000.0))),
        "rope_dims": int(head_dim * partial),
        "rope_traditional": body.get("rope_is_neox_style", True) is False,
        "rope_scaling": dict(scaling) if scaling else None,
        "max_position_embeddings": int(body.get("max_position_embeddings") or 0),
        "has_own_embedding": "embed_tokens.weight" in names,
        "has_own_head": "lm_head.weight" in names,
    }


def _refuse(folder: Path, config: Config, extra: Config, body: Config) -> None:
    """Forms whose arithmetic is not known well enough to be exact."""
    for key in ("log_snr_conditioning", "attention_sink_bias", "enable_qwen35_gated_q_proj"):
        if config.get(key) or extra.get(key):
            raise BadModel(f"{folder}: a drafter with {key} is not supported")
    projector = extra.get("projector_type")
    if projector not in (None, "dflash", "dspark", "dflash2"):
        raise BadModel(f"{folder}: projector_type {projector!r} is not supported")
    if config.get("markov_head_type", "vanilla") != "vanilla":
        raise BadModel(f"{folder}: markov_head_type {config['markov_head_type']!r} is not supported")
    if str(body.get("model_type", "")).startswith("gemma"):
        raise BadModel(f"{folder}: a drafter with Gemma layers ({body['model_type']}) is not supported")


_EAGLE3_TENSORS = re.compile(
    r"(norm|input_norm|layers\.0\.(input_layernorm|hidden_norm|post_attention_layernorm))\.weight|d2t"
    r"|(fc|lm_head|embed_tokens|layers\.0\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj))"
    r"\.(weight|bias|scales|biases)"
)


def _refuse_unknown_eagle3(folder: Path, config: Config, names: Mapping[str, str]) -> None:
    """A tensor that nothing here would use changes what the drafter computes, in a way that could only be guessed.

    Among them EAGLE-3.1's norms of each tap (`fc_norm`), whose order with the concatenation is not published.
    """
    if config.get("fc_norm"):
        raise BadModel(f"{folder}: an EAGLE-3.1 drafter (fc_norm) is not supported")
    if config.get("norm_before_fc") and "input_norm.weight" not in names:
        raise BadModel(f"{folder}: config.json says norm_before_fc, and input_norm is not among the tensors")
    unknown = sorted(stored for name, stored in names.items() if not _EAGLE3_TENSORS.fullmatch(name))
    if unknown:
        raise BadModel(f"{folder}: an EAGLE-3 drafter with {', '.join(unknown[:4])} is not supported")


def _windows(
    folder: Path, config: Config, body: Config, extra: Config, num_layers: int
) -> tuple[tuple[int | None, ...], list[str]]:
    """The sliding window of each layer (None: full attention), and the layer types."""
    kinds = [str(k) for k in body.get("layer_types") or ["full_attention"] * num_layers]
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise BadModel(f"{folder}: layer_types {kinds} for {num_layers} layers")
    window: Any = body.get("sliding_window") or config.get("sliding_window") or extra.get("swa_window_size")
    if "sliding_attention" in kinds and not window:
        raise BadModel(f"{folder}: sliding layers without sliding_window")
    return tuple(int(window) if k == "sliding_attention" else None for k in kinds), kinds


def _causal_layers(config: Config, extra: Config, kinds: list[str], is_dspark: bool) -> tuple[bool, ...]:
    """`is_causal`, else `causal` or `causal_head`; else sliding layers are causal in the block and full ones not."""
    said = _first(config, extra, "is_causal")
    if said is None:
        said = _first(extra, config, "causal", "causal_head", "dflash_query_causal")
    if said is None and "sliding_window_non_causal" in config:
        said = not config["sliding_window_non_causal"] and "sliding_attention" in kinds
    if said is None and is_dspark and "sliding_attention" not in kinds:
        said = False
    return tuple(kind == "sliding_attention" if said is None else bool(said) for kind in kinds)


def _is_anchor_sampled(config: Config, extra: Config, is_dspark: bool, block_size: int) -> bool:
    """Whether row 0 predicts too. The number of proposed tokens decides where a checkpoint states it.

    Off by one here costs half the acceptance and nothing else shows it.
    """
    num_proposed = _proposed_tokens(config)
    if num_proposed is not None and block_size - 1 <= num_proposed <= block_size:
        return num_proposed == block_size
    said = _first(config, extra, "sample_from_anchor")
    if said is not None:
        return bool(said)
    return is_dspark and "speculators_model_type" not in config


def _embedding_scale(config: Config, extra: Config, body: Config, target: Config | None) -> float:
    """What the target's raw embedding rows are multiplied with: Gemma targets scale theirs by sqrt(H)."""
    said = _first(config, extra, "input_embedding_scale")
    if said is not None:
        return float(said)
    is_gemma = target is not None and "gemma" in str(_section(target).get("model_type", ""))
    return float(int(body["hidden_size"]) ** 0.5) if is_gemma else 1.0


def _checked_taps(
    folder: Path, taps: tuple[int, ...], fc_shape: tuple[int, ...], target: Config | None
) -> tuple[int, ...]:
    if min(taps) < 0:
        raise BadModel(f"{folder}: a tap before the first block is not supported")
    if len(fc_shape) != 2 or fc_shape[1] % len(taps):
        raise BadModel(f"{folder}: fc of shape {fc_shape} for {len(taps)} taps")
    if target is not None:
        body = _section(target)
        depth, width = int(body.get("num_hidden_layers", 0)), int(body.get("hidden_size", 0))
        if depth and max(taps) >= depth:
            raise BadModel(f"{folder}: tap after block {max(taps)}, but the target has {depth} blocks")
        if width and fc_shape[1] != len(taps) * width and not _is_packed(fc_shape, taps, width):
            raise BadModel(
                f"{folder}: fc takes {fc_shape[1]} numbers, {len(taps)} taps of the target give {width} each"
            )
    return taps


def _is_packed(fc_shape: tuple[int, ...], taps: tuple[int, ...], width: int) -> bool:
    """Whether an MLX-quantised `fc` (32 bits hold several weights) has the right width for some bit count."""
    return any(fc_shape[1] * 32 == len(taps) * width * bits for bits in (2, 3, 4, 5, 6, 8))


def _proposed_tokens(config: Config) -> int | None:
    speculators: Config = config.get("speculators_config") or {}
    methods: list[Config] = speculators.get("proposal_methods") or [{}]
    said: Any = methods[0].get("speculative_tokens")
    return None if said is None else int(said)


def _require(folder: Path, kind: str, names: Mapping[str, str], needed: list[str]) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        more = f" and {len(missing) - 5} more" if missing[5:] else ""
        raise BadModel(f"{folder} is no {kind} drafter that is supported: it lacks {', '.join(missing[:5])}{more}")


def _section(config: Config) -> Config:
    """The part with the transformer's dimensions."""
    section = config.get("transformer_layer_config") or config.get("text_config") or config
    return section if isinstance(section, Mapping) else config


def _hidden_size(config: Config) -> int | None:
    return _section(config).get("hidden_size")


def _rows(index: TensorIndex, stored: str) -> int:
    return index.shapes[stored][0]


def _first(first: Config, second: Config, *keys: str) -> Any:  # noqa: ANN401 - a JSON value
    """The first of `keys` that `first` or then `second` has with a value."""
    for key in keys:
        for config in (first, second):
            if config.get(key) is not None:
                return config[key]
    return None


def _read_config(folder: Path) -> Config:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise BadModel(f"cannot read the drafter's config.json in {folder}: {error}") from error
    if not isinstance(config, dict):
        raise BadModel(f"{folder}/config.json is not an object")
    return config
