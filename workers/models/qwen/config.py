"""What tells one Qwen-VL model from another, read from config.json in the layouts of Hugging Face and MLX."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shared.errors import BadModel
from workers.models.decoder import DecoderConfig
from workers.models.encoder_parts import ACTIVATIONS
from workers.models.rope import RopeParameters, rope_parameters

THIRD = ("qwen3_vl", "qwen3_vl_moe")
MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl", *THIRD)
MLX_LM_TYPES = ("qwen3_5", "qwen3_5_moe")  # mlx-lm's text decoder, our image encoder


@dataclass(frozen=True)
class VisionConfig:
    """Sizes in patches unless they say pixels. `full_layers` None: every layer attends to the whole frame."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    output_size: int
    in_channels: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int
    activation: str
    is_gated: bool  # gate, up and down projections and RMS norms
    window: int | None  # in merged patches
    full_layers: tuple[int, ...] | None
    num_positions: int | None  # learned, resampled to each image's grid
    deep_layers: tuple[int, ...]  # whose output joins the text decoder's first layers
    rope_theta: float


@dataclass(frozen=True)
class ExpertShape:
    """`layers` have experts, the others an MLP."""

    num_experts: int
    num_chosen: int  # for each token
    intermediate_size: int  # of one expert
    layers: frozenset[int]

    @classmethod
    def from_hf(cls, text: dict[str, Any]) -> ExpertShape:
        """Raises KeyError and such where fields are missing or malformed, BadModel where they contradict each other."""
        dense, step = text.get("mlp_only_layers") or (), int(text.get("decoder_sparse_step") or 1)
        made = cls(
            num_experts=int(text.get("num_local_experts") or text["num_experts"]),  # transformers 5 and before
            num_chosen=int(text["num_experts_per_tok"]),
            intermediate_size=int(text["moe_intermediate_size"]),
            layers=frozenset(
                i for i in range(int(text["num_hidden_layers"])) if i not in dense and (i + 1) % step == 0
            ),
        )
        if not 0 < made.num_chosen <= made.num_experts:
            raise BadModel(f"{made.num_chosen} of {made.num_experts} experts")
        return made


@dataclass(frozen=True)
class QwenConfig:
    model_type: str
    text: DecoderConfig
    vision: VisionConfig
    experts: ExpertShape | None
    sections: tuple[int, int, int]  # rotary frequencies that time, height and width turn
    is_interleaved: bool  # height and width take every third frequency; False: axes lie one behind the other
    temporal_scale: float  # position steps per second of video; 0: frames count as one step each

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """As `DecoderConfig.attention_heads`."""
        return self.text.attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> QwenConfig:
        """Read a config.json, with the text decoder's fields beside `vision_config` or in `text_config`.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed here.
        """
        model_type = config["model_type"]
        text = {**(config.get("text_config") or config)}
        is_third = model_type in THIRD
        text["model_type"] = "qwen3" if is_third else "qwen2"
        text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
        decoder = DecoderConfig.from_hf(text, max_model_len)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        default = [24, 20, 20] if is_third else [16, 24, 24]
        try:
            sections = tuple(int(n) for n in rope.get("mrope_section", default))
            vision = _vision(config["vision_config"], model_type, decoder.hidden_size)
            scale = float(config["vision_config"].get("tokens_per_second", 4)) if model_type == "qwen2_5_vl" else 0.0
            experts = ExpertShape.from_hf(text) if model_type == "qwen3_vl_moe" else None
        except KeyError as missing:
            raise BadModel(f"{model_type}: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error
        if len(sections) != 3 or (not is_third and sum(sections) * 2 != decoder.head_dim):
            raise BadModel(f"{model_type}: mrope_section {sections} does not fit heads of {decoder.head_dim}")
        return cls(model_type, decoder, vision, experts, (sections[0], sections[1], sections[2]), is_third, scale)


@dataclass(frozen=True)
class AddedVisionConfig:
    """A model of `MLX_LM_TYPES`: what mlx-lm's class takes, and what lies beside it.

    Args:
        text_args: mlx-lm's `ModelArgs`.
        vision: None: the configuration tells of no image encoder.
        rope: of the turning dimensions of a head.
    """

    model_type: str
    text_args: Any
    vision: VisionConfig | None
    sections: tuple[int, int, int]
    rope: RopeParameters

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], max_model_len: int, read_text: Callable[[dict[str, Any]], Any]
    ) -> AddedVisionConfig:
        """Read a config.json.

        Args:
            read_text: mlx-lm's `ModelArgs.from_dict`.
        Raises:
            BadModel: as `QwenConfig.from_hf`.
        """
        model_type = config["model_type"]
        try:
            text = {**(config.get("text_config") or config)}
            rope = {**(text.get("rope_parameters") or text.get("rope_scaling") or {})}
            share = rope.pop("partial_rotary_factor", None) or text.pop("partial_rotary_factor", None) or 0.25
            head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
            turning = rope_parameters({**text, "rope_parameters": rope}, int(head_dim * share), max_model_len)
            sections = tuple(int(n) for n in rope.get("mrope_section", [11, 11, 10]))
            has_vision = config.get("vision_config") is not None
            vision = _vision(config["vision_config"], model_type, int(text["hidden_size"])) if has_vision else None
            given = copy.deepcopy(config)  # mlx-lm changes the dictionaries that it gets
            text = given.get("text_config") or given
            set_interval(text, model_type)
            text["tie_word_embeddings"] = any(part.get("tie_word_embeddings") for part in (config, text))
            text_args = read_text(given)
        except KeyError as missing:
            raise BadModel(f"{model_type}: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error
        if len(sections) != 3:
            raise BadModel(f"{model_type}: mrope_section {sections} is not one number for each of three axes")
        return cls(model_type, text_args, vision, (sections[0], sections[1], sections[2]), turning)


def set_interval(text: dict[str, Any], model_type: str) -> None:
    """mlx-lm goes by `full_attention_interval`; transformers 5 writes `layer_types` in its place."""
    kinds = text.get("layer_types")
    if not kinds:
        return
    interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    if any((kind == "full_attention") != (i % interval == 0) for i, kind in enumerate(kinds, start=1)):
        raise BadModel(f"{model_type}: layers that attend at uneven distances are not supported")
    text["full_attention_interval"] = interval


_VISION_KINDS: dict[str, Literal["layer", "window", "deep"]] = {
    "qwen2_vl": "layer", "qwen2_5_vl": "window", "qwen3_vl": "deep", "qwen3_vl_moe": "deep", "qwen3_5": "deep",
    "qwen3_5_moe": "deep",
}  # fmt: skip


def _vision(config: dict[str, Any], model_type: str, text_size: int) -> VisionConfig:
    kind = _VISION_KINDS[model_type]
    # Qwen2-VL calls the encoder's width `embed_dim` and its output `hidden_size`.
    hidden = int(config["embed_dim"] if kind == "layer" else config["hidden_size"])
    default = {"layer": "quick_gelu", "window": "silu", "deep": "gelu_pytorch_tanh"}[kind]
    activation = config.get("hidden_act") or default
    if activation not in ACTIVATIONS:
        raise BadModel(f"{model_type}: hidden_act {activation!r} of the image encoder is not supported")
    if kind == "layer":
        inner, output = int(hidden * config.get("mlp_ratio", 4)), int(config.get("hidden_size", text_size))
    else:
        inner, output = int(config["intermediate_size"]), int(config.get("out_hidden_size", text_size))
    patch, merge = int(config.get("patch_size", 16 if kind == "deep" else 14)), int(config.get("spatial_merge_size", 2))
    made = VisionConfig(
        depth=int(config["depth"]),
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=int(config["num_heads"]),
        output_size=output,
        in_channels=int(config.get("in_channels") or config.get("in_chans") or 3),
        patch_size=patch,
        temporal_patch_size=int(config.get("temporal_patch_size", 2)),
        merge_size=merge,
        activation=activation,
        is_gated=kind == "window",
        window=int(config.get("window_size", 112)) // merge // patch if kind == "window" else None,
        full_layers=tuple(int(i) for i in config["fullatt_block_indexes"]) if kind == "window" else None,
        num_positions=int(config["num_position_embeddings"]) if kind == "deep" else None,
        deep_layers=tuple(int(i) for i in config.get("deepstack_visual_indexes", ())) if kind == "deep" else (),
        rope_theta=float((config.get("rope_parameters") or {}).get("rope_theta", 10_000.0)),
    )
    if made.hidden_size % (made.num_heads * 4) or made.window == 0 or output != text_size:
        raise BadModel(f"{model_type}: the image encoder's sizes do not fit each other or the text decoder")
    return made
