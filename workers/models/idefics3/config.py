"""What tells one Idefics3 or SmolVLM from another, read from config.json in the layouts of Hugging Face and MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.errors import BadModel
from workers.models.decoder import DecoderConfig
from workers.models.siglip import SiglipConfig

MODEL_TYPES = ("idefics3", "smolvlm")

# Checkpoints leave out what has the default of transformers' classes.
_TEXT_DEFAULTS = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Idefics3Config:
    """`vision` is None for a conversion that has text only; `scale_factor`: patches a side that become one token."""

    text: DecoderConfig
    vision: SiglipConfig | None
    scale_factor: int

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """As `DecoderConfig.attention_heads`."""
        return self.text.attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> Idefics3Config:
        """Read a config.json.

        Raises:
            BadModel: a needed field is missing or malformed, or asks for something that is not computed here.
        """
        model_type = config["model_type"]
        try:
            text = _TEXT_DEFAULTS | (config.get("text_config") or {})
            # The outer field decides: text_config often says otherwise, and transformers does not look there.
            text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
            scale_factor = int(config.get("scale_factor", 2))
            given = config.get("vision_config")
            vision = _vision({**given}) if given is not None else None
        except (TypeError, ValueError) as error:
            raise BadModel(f"{model_type}: malformed configuration: {error}") from error
        if scale_factor < 1 or (vision is not None and vision.patches_per_side < scale_factor):
            raise BadModel(f"{model_type}: scale_factor {scale_factor} does not suit the image encoder")
        return cls(DecoderConfig.from_hf(text, max_model_len), vision, scale_factor)


def _vision(config: dict[str, Any]) -> SiglipConfig:
    if (channels := config.get("num_channels", 3)) != 3:
        raise BadModel(f"vision: num_channels {channels!r} is not supported")
    return SiglipConfig.from_hf(_VISION_DEFAULTS | config)
