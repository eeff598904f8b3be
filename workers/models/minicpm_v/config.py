"""What tells one MiniCPM-V from another, read from config.json in the layouts of Hugging Face and MLX."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from mlx_lm.models import qwen3_5

from shared.errors import BadModel
from workers.models.qwen.config import set_interval
from workers.models.siglip import SiglipConfig

MODEL_TYPES = ("minicpmv4_6",)

MERGE_SIZE = 2  # patches along a side of what becomes one, in every merge

_ENCODERS = ("minicpmv4_6_vision", "siglip_vision_model", "siglip")
# Checkpoints may leave out what has the default of transformers' classes; mlx-lm has others.
_TEXT_DEFAULTS = {
    "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 32_768,
    "attention_bias": False, "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
}  # fmt: skip


@dataclass(frozen=True)
class VisionConfig:
    """Args:
    merged_layer: behind this layer the encoder merges its patches; None: it does not (`downsample_mode` 4x).
    merger_times: rounds of merges between the encoder and the text decoder.
    output_size: the text decoder's width.
    """

    layers: SiglipConfig
    merged_layer: int | None
    merger_times: int
    output_size: int

    @classmethod
    def from_hf(cls, config: dict[str, Any], output_size: int) -> VisionConfig:
        """Read a config.json with a `vision_config`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: malformed.
            BadModel: it asks for something that is not computed here.
        """
        vision = config["vision_config"]
        if (kind := vision.get("model_type") or _ENCODERS[0]) not in _ENCODERS:
            raise BadModel(f"minicpmv4_6: image encoder {kind!r} is not supported")
        if int(vision.get("num_channels") or 3) != 3:
            raise BadModel(f"minicpmv4_6: images of {vision['num_channels']} channels are not supported")
        for name, kernel in (
            ("window_kernel_size", vision.get("window_kernel_size")),
            ("merge_kernel_size", config.get("merge_kernel_size")),
        ):
            if kernel is not None and list(kernel) != [MERGE_SIZE, MERGE_SIZE]:
                raise BadModel(f"minicpmv4_6: {name} {list(kernel)} is not supported, only two by two")
        if config.get("drop_vision_last_layer"):
            # transformers computes the last layer all the same, others do not.
            raise BadModel("minicpmv4_6: drop_vision_last_layer is not supported")
        if (mode := config.get("downsample_mode") or "16x") not in ("16x", "4x"):
            raise BadModel(f"minicpmv4_6: downsample_mode {mode!r} is not supported")
        layers = SiglipConfig.from_hf(vision)
        layer = int(config.get("insert_layer_id", vision.get("insert_layer_id", 6)))
        if mode == "16x" and not 0 <= layer < layers.num_layers:
            raise BadModel(f"minicpmv4_6: insert_layer_id {layer} is none of {layers.num_layers} layers")
        if (times := int(config.get("merger_times", 1))) < 1:
            raise BadModel(f"minicpmv4_6: merger_times {times} is not supported")
        return cls(layers, layer if mode == "16x" else None, times, output_size)


@dataclass(frozen=True)
class MiniCpmVConfig:
    """Args:
    text_args: mlx-lm's `ModelArgs`.
    vision: None: the configuration tells of no image encoder.
    """

    text_args: Any
    vision: VisionConfig | None

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> MiniCpmVConfig:
        """Read a config.json.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed here.
        """
        try:
            text = _text(config)
            has_vision = config.get("vision_config") is not None
            vision = VisionConfig.from_hf(config, int(text["hidden_size"])) if has_vision else None
            text_args = qwen3_5.ModelArgs(model_type=config["model_type"], text_config=text)
            return cls(text_args, vision)
        except KeyError as missing:
            raise BadModel(f"minicpmv4_6: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"minicpmv4_6: malformed configuration: {error}") from error


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's `TextModelArgs` reads.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, BadModel: as `VisionConfig.from_hf`.
    """
    text: dict[str, Any] = _TEXT_DEFAULTS | copy.deepcopy(config["text_config"])
    for name, computed in (("model_type", "qwen3_5_text"), ("hidden_act", "silu"), ("attn_output_gate", True)):
        if (found := text.setdefault(name, computed)) != computed:
            raise BadModel(f"minicpmv4_6: {name} {found!r} of the text decoder is not supported")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        text[name] = int(text[name])
    kinds = text.get("layer_types")
    if kinds and len(kinds) != text["num_hidden_layers"]:
        raise BadModel(f"minicpmv4_6: layer_types tells of {len(kinds)} of {text['num_hidden_layers']} layers")
    set_interval(text, "minicpmv4_6")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    # Axes would all have the same positions.
    if (kind := rope.get("rope_type") or rope.get("type") or "default") not in ("default", "mrope"):
        raise BadModel(f"minicpmv4_6: rope type {kind!r} is not supported")
    share = rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 0.25
    theta = rope["rope_theta"] if "rope_theta" in rope else text["rope_theta"]
    text["rope_parameters"] = {
        "type": "default", "rope_theta": float(theta), "partial_rotary_factor": float(share),
    }  # fmt: skip
    # The outer field decides, as in transformers.
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    return text
