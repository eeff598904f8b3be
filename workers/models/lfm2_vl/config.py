"""What tells one LFM2-VL model from another, read from config.json in the layouts of Hugging Face and MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lm.models import lfm2

from shared.errors import BadModel
from workers.models.encoder_parts import ACTIVATIONS
from workers.models.siglip import SiglipConfig

MODEL_TYPES = ("lfm2_vl", "lfm2-vl")  # the first release and MLX have a hyphen

_ENCODERS = ("siglip2_vision_model", "siglip2", "lfm2_vl")
_LAYER_TYPES = {"conv", "full_attention"}


@dataclass(frozen=True)
class VisionConfig:
    """Args:
    layers: the encoder's layers; of an image of one size it knows nothing.
    side: of the square of learned positions, which is resampled to each image's grid.
    merge_size: so many patches along each side of a square become one token.
    """

    layers: SiglipConfig
    side: int
    merge_size: int
    projector_size: int
    projector_activation: str
    has_projector_bias: bool
    has_projector_norm: bool
    output_size: int

    @property
    def patch_size(self) -> int:
        """Pixels."""
        return self.layers.patch_size

    @classmethod
    def from_hf(cls, config: dict[str, Any], output_size: int) -> VisionConfig:
        """Read a config.json with a `vision_config`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: malformed.
            BadModel: it asks for something that is not computed here.
        """
        vision = config["vision_config"]
        if (kind := vision.get("model_type") or _ENCODERS[0]) not in _ENCODERS:
            raise BadModel(f"lfm2_vl: image encoder {kind!r} is not supported")
        if int(vision.get("num_channels") or 3) != 3:
            raise BadModel(f"lfm2_vl: images of {vision['num_channels']} channels are not supported")
        if (layer := config.get("vision_feature_layer")) not in (None, -1):
            raise BadModel(f"lfm2_vl: vision_feature_layer {layer!r} is not supported")
        if (activation := config.get("projector_hidden_act") or "gelu") not in ACTIVATIONS:
            raise BadModel(f"lfm2_vl: projector_hidden_act {activation!r} is not supported")
        num_positions = int(vision.get("num_patches") or 256)
        made = cls(
            layers=SiglipConfig.from_hf(vision),
            side=int(num_positions**0.5),
            merge_size=int(config.get("downsample_factor") or 2),
            projector_size=int(config.get("projector_hidden_size") or 2560),
            projector_activation=activation,
            has_projector_bias=bool(config.get("projector_bias", True)),
            has_projector_norm=bool(config.get("projector_use_layernorm", True)),
            output_size=output_size,
        )
        if made.side**2 != num_positions:
            raise BadModel(f"lfm2_vl: num_patches {num_positions} is not a square")
        return made


@dataclass(frozen=True)
class Lfm2VlConfig:
    """Args:
    text: mlx-lm's `ModelArgs`.
    is_tied: the head is the embedding.
    vision: None: the configuration tells of no image encoder.
    """

    text: Any
    is_tied: bool
    vision: VisionConfig | None

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> Lfm2VlConfig:
        """Read a config.json.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed here.
        """
        try:
            text = _text_args(config["text_config"])
            has_vision = config.get("vision_config") is not None
            return cls(
                text=text,
                # The text decoder's own field tells nothing: mlx-lm writes False there and ties the head.
                is_tied=bool(config.get("tie_embedding", config.get("tie_word_embeddings", True))),
                vision=VisionConfig.from_hf(config, text.hidden_size) if has_vision else None,
            )
        except KeyError as missing:
            raise BadModel(f"lfm2_vl: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"lfm2_vl: malformed configuration: {error}") from error


def _text_args(config: dict[str, Any]) -> Any:  # noqa: ANN401 - mlx-lm's class
    """mlx-lm's ModelArgs, which goes by `full_attn_idxs` and wants fields that transformers leaves out."""
    text = {**config}
    if (kind := text.get("model_type") or "lfm2") != "lfm2":
        raise BadModel(f"lfm2_vl: text decoder {kind!r} is not supported")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if (rope_type := rope.get("rope_type") or rope.get("type") or "default") != "default":
        raise BadModel(f"lfm2_vl: rope type {rope_type!r} is not supported")
    hidden, num_heads, num_layers = (
        int(text[key]) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    if hidden % num_heads or (text.get("head_dim") or hidden // num_heads) != hidden // num_heads:
        raise BadModel(f"lfm2_vl: {num_heads} heads of {text.get('head_dim')} for a width of {hidden}")
    kinds = text.get("layer_types")
    if kinds is None:
        chosen = text.get("full_attn_idxs")
        kinds = ["full_attention" if chosen is None or i in chosen else "conv" for i in range(num_layers)]
    if len(kinds) != num_layers or set(kinds) != _LAYER_TYPES:
        raise BadModel(f"lfm2_vl: layer_types {sorted(set(kinds))}, {len(kinds)} of {num_layers}, are not supported")
    text |= {
        "layer_types": kinds,
        "full_attn_idxs": [i for i, kind in enumerate(kinds) if kind == "full_attention"],
        "block_dim": hidden,
        "block_ff_dim": _mlp_size(text),
        "block_auto_adjust_ff_dim": False,
        "model_type": "lfm2",
    }
    defaults = {
        "num_key_value_heads": 8, "max_position_embeddings": 128_000, "norm_eps": 1e-5, "conv_bias": False,
        "conv_L_cache": 3, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0, "rope_theta": 1e6,
    }  # fmt: skip
    return lfm2.ModelArgs.from_dict({**defaults, **text})


def _mlp_size(text: dict[str, Any]) -> int:
    """The MLP's width; configurations give the one before it is adjusted."""
    size = int(text.get("block_ff_dim") or text["intermediate_size"])
    if not text.get("block_auto_adjust_ff_dim", True):
        return size
    multiplier, unit = float(text.get("block_ffn_dim_multiplier") or 1.0), int(text.get("block_multiple_of") or 256)
    return -(-int(multiplier * int(2 * size / 3)) // unit) * unit
