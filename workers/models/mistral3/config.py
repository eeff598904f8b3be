"""What tells Mistral 3, Ministral 3 and Pixtral models apart, read from config.json as Hugging Face and MLX have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import BadModel
from workers.models import decoder
from workers.models.decoder import DecoderConfig
from workers.models.encoder_parts import ACTIVATIONS

MODEL_TYPES = ("mistral3", "llava", "pixtral")  # the last is MLX's name for a `llava` with Pixtral's encoder

# transformers' defaults, which configurations leave out.
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_attention_heads": 32, "num_key_value_heads": 8},
    "ministral3": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5},
}
_DEFAULT_WINDOW = 4096  # of Mistral's layers, except in the files that have MLX's name


def is_defined(config: dict[str, Any]) -> bool:
    """Is this a text decoder of ours with Pixtral's encoder or none? mlx-lm serves the text of the others."""
    text, vision = config.get("text_config"), config.get("vision_config")
    is_llava = bool(config["model_type"] == "llava")  # whose encoder is CLIP's if nothing is said
    if not isinstance(text, dict) or text.get("model_type", "mistral") not in decoder.MODEL_TYPES:
        return False
    if vision is None:
        return not is_llava
    return isinstance(vision, dict) and bool(vision.get("model_type", None if is_llava else "pixtral") == "pixtral")


@dataclass(frozen=True)
class VisionConfig:
    """Args:
    feature_layers: whose outputs lie side by side in a patch's features; 0 is what the first layer takes.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # pixels
    activation: str
    rope_theta: float
    feature_layers: tuple[int, ...]


@dataclass(frozen=True)
class ProjectorConfig:
    """Args:
    merge_size: patches a side that become one token after a norm (Mistral 3); None: each patch is one (Pixtral).
    norm_eps: of that norm.
    """

    output_size: int
    merge_size: int | None
    activation: str
    has_bias: bool
    norm_eps: float


@dataclass(frozen=True)
class Mistral3Config:
    """Args:
    may_lack_head: a checkpoint without a head ties it to the embedding; False: the configuration says that it has one.
    """

    model_type: str
    text: DecoderConfig
    vision: VisionConfig | None
    projector: ProjectorConfig
    may_lack_head: bool

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """As `DecoderConfig.attention_heads`."""
        return self.text.attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> Mistral3Config:
        """Read a config.json for which `is_defined`.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed here.
        """
        model_type = config["model_type"]
        text = {"model_type": "mistral", **config["text_config"]}
        said = [part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part]
        defaults = _TEXT_DEFAULTS.get(text["model_type"], {})
        if text["model_type"] == "mistral" and model_type != "pixtral":
            defaults = defaults | {"sliding_window": _DEFAULT_WINDOW}
        # Whether the head is tied, the checkpoint tells: transformers' default for Mistral 3 is that it is, and most
        # of its checkpoints, with a head of their own, say nothing.
        decoder_config = DecoderConfig.from_hf({**defaults, **text, "tie_word_embeddings": False}, max_model_len)
        try:
            vision = _vision(config) if config.get("vision_config") is not None else None
            projector = _projector(config, decoder_config)
        except KeyError as missing:
            raise BadModel(f"{model_type}: {missing} is missing from the model's configuration") from missing
        except (TypeError, ValueError, AttributeError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error
        return cls(model_type, decoder_config, vision, projector, may_lack_head=not said or any(said))


def _vision(config: dict[str, Any]) -> VisionConfig:
    model_type, vision = config["model_type"], config["vision_config"]
    if model_type == "llava" and (strategy := config.get("vision_feature_select_strategy", "default")) != "full":
        raise BadModel(f"llava: vision_feature_select_strategy {strategy!r} is not supported, Pixtral needs 'full'")
    rope = vision.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "axial")) not in ("axial", "default"):
        raise BadModel(f"{model_type}: rope type {kind!r} of the image encoder is not supported")
    if (channels := vision.get("num_channels", 3)) != 3:
        raise BadModel(f"{model_type}: images of {channels} channels are not supported")
    layers = config.get("vision_feature_layer", -2 if model_type == "llava" else -1)
    layers = layers if isinstance(layers, list) else [layers]
    num_layers = int(vision.get("num_hidden_layers", 24))
    made = VisionConfig(
        hidden_size=int(vision.get("hidden_size", 1024)),
        intermediate_size=int(vision.get("intermediate_size", 4096)),
        num_layers=num_layers,
        num_heads=int(vision.get("num_attention_heads", 16)),
        patch_size=int(vision.get("patch_size", 16)),
        activation=_activation(vision.get("hidden_act") or "gelu", model_type),
        rope_theta=float(rope.get("rope_theta") or vision.get("rope_theta") or 10_000.0),
        feature_layers=tuple(int(i) if i >= 0 else num_layers + 1 + int(i) for i in layers),
    )
    if not made.feature_layers or not all(0 <= i <= num_layers for i in made.feature_layers):
        raise BadModel(f"{model_type}: vision_feature_layer {layers} of {num_layers} layers")
    if model_type == "mistral3" and len(made.feature_layers) > 1:
        raise BadModel(f"mistral3: several vision_feature_layer ({layers}) are not supported")
    head_dim = made.hidden_size // made.num_heads
    if made.hidden_size % (made.num_heads * 4) or vision.get("head_dim", head_dim) != head_dim or made.patch_size < 1:
        raise BadModel(f"{model_type}: the image encoder's sizes do not fit each other")
    return made


def _projector(config: dict[str, Any], text: DecoderConfig) -> ProjectorConfig:
    model_type = config["model_type"]
    is_mistral3 = model_type == "mistral3"
    made = ProjectorConfig(
        output_size=text.hidden_size,
        merge_size=int(config.get("spatial_merge_size", 2)) if is_mistral3 else None,
        activation=_activation(config.get("projector_hidden_act") or "gelu", model_type),
        has_bias=bool(config.get("multimodal_projector_bias", not is_mistral3)),
        norm_eps=text.rms_norm_eps,
    )
    if made.merge_size is not None and made.merge_size < 1:
        raise BadModel(f"{model_type}: spatial_merge_size {made.merge_size}")
    return made


def _activation(name: str, model_type: str) -> str:
    if name not in ACTIVATIONS:
        raise BadModel(f"{model_type}: activation {name!r} of the image encoder or its projector is not supported")
    return name
