"""A multimodal Gemma: text decoder, image encoder and audio encoder under the names that checkpoints have."""

# mypy: disable-error-code="misc, no-any-return"
# mlx.nn has no types, so its modules are Any to mypy.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from shared.errors import BadModel
from shared.messages import MediaItem, MediaKind
from workers.models.beside_text import BesideText
from workers.models.checkpoint_names import canonical_name
from workers.models.gemma.audio import AudioConfig, AudioTower
from workers.models.gemma.clipped import MediaEmbedder
from workers.models.gemma.config import GemmaConfig
from workers.models.gemma.siglip import Projector, SiglipTower
from workers.models.gemma.text import TextDecoder
from workers.models.gemma.unified import UnifiedAudioConfig, UnifiedVisionConfig, UnifiedVisionEmbedder
from workers.models.gemma.vision import VisionConfig, VisionTower, cut_patches
from workers.models.siglip import SiglipConfig

IMAGE_PARTS = ("vision_tower", "embed_vision", "multi_modal_projector", "vision_embedder")
AUDIO_PARTS = ("audio_tower", "embed_audio")
ENCODER_PARTS = (*IMAGE_PARTS, *AUDIO_PARTS)

MAX_SOFT_TOKENS = 280  # of an image, where the configuration does not say


@dataclass(frozen=True)
class MultimodalConfig:
    """`vision` and `audio` are None where the model has no such encoder."""

    text: GemmaConfig
    vision: VisionConfig | SiglipConfig | UnifiedVisionConfig | None
    audio: AudioConfig | UnifiedAudioConfig | None
    num_image_tokens: int  # of every image for Gemma 3, of the largest for Gemma 4

    @property
    def attention_heads(self) -> set[tuple[int, int, int]]:
        """As `GemmaConfig.attention_heads`."""
        return self.text.attention_heads

    @classmethod
    def from_hf(cls, config: dict[str, Any], max_model_len: int) -> MultimodalConfig:
        """Read a config.json.

        Raises:
            BadModel: as the parts' own readers say.
        """
        text = GemmaConfig.from_hf(config, max_model_len)
        vision, audio = config.get("vision_config"), config.get("audio_config")
        if text.model_type == "gemma3":
            return cls(text, SiglipConfig.from_hf(vision) if vision else None, None, _num_image_tokens(config))
        is_unified = text.model_type == "gemma4_unified"
        read_vision = UnifiedVisionConfig.from_hf if is_unified else VisionConfig.from_hf
        read_audio = UnifiedAudioConfig.from_hf if is_unified else AudioConfig.from_hf
        return cls(
            text,
            read_vision(vision) if vision is not None else None,
            read_audio(audio) if audio is not None else None,
            int(config.get("vision_soft_tokens_per_image") or MAX_SOFT_TOKENS),
        )


def _num_image_tokens(config: dict[str, Any]) -> int:
    count = config.get("mm_tokens_per_image") or 256
    if not isinstance(count, int) or int(count**0.5) ** 2 != count:
        raise BadModel(f"gemma3: mm_tokens_per_image {count!r} is not a square")
    return count


class Gemma(BesideText):
    """Also a `MediaModel` of workers/models/base.py; parameters are named as in MLX's checkpoints."""

    def __init__(self, config: MultimodalConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = TextDecoder(config.text)
        hidden = config.text.hidden_size
        self.vision_tower: Any
        self.embed_vision: Any
        if isinstance(config.vision, SiglipConfig):
            self.vision_tower = SiglipTower(config.vision)
            self.multi_modal_projector = Projector(config.vision, config.num_image_tokens, hidden)
        elif isinstance(config.vision, UnifiedVisionConfig):
            self.embed_vision = UnifiedVisionEmbedder(config.vision, hidden)
        elif config.vision is not None:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = MediaEmbedder(config.vision.hidden_size, hidden, config.vision.rms_norm_eps)
        if isinstance(config.audio, UnifiedAudioConfig):
            self.embed_audio = MediaEmbedder(config.audio.frame_size, hidden, config.audio.rms_norm_eps)
        elif config.audio is not None:
            self.audio_tower = AudioTower(config.audio)
            self.embed_audio = MediaEmbedder(config.audio.output_size, hidden, config.audio.rms_norm_eps)

    @property
    def has_vision(self) -> bool:
        return "vision_tower" in self or "embed_vision" in self

    @property
    def has_audio(self) -> bool:
        return "embed_audio" in self

    def shared_layers(self) -> list[int]:
        """As `TextDecoder.shared_layers`."""
        return self.language_model.shared_layers()

    def embedding_rows(self, inputs: mx.array) -> mx.array:
        """As `TextDecoder.embedding_rows`."""
        return self.language_model.embedding_rows(inputs)

    def uncapped_logits(self, hidden: mx.array) -> mx.array:
        """As `TextDecoder.uncapped_logits`."""
        return self.language_model.uncapped_logits(hidden)

    @property
    def modalities(self) -> list[MediaKind]:
        found: list[MediaKind] = ["image"] if self.has_vision else []
        return [*found, "audio"] if self.has_audio else found

    @property
    def whole_media(self) -> list[MediaKind]:
        """Kinds whose tokens see later ones of their own item, so that one step must hold them all."""
        return ["image"] if self.has_vision and self.config.text.spans != "none" else []

    @property
    def max_whole_tokens(self) -> int:
        """Of one item of `whole_media`."""
        return self.config.num_image_tokens if self.whole_media else 0

    def media_positions(self, num_tokens: int, media: Sequence[MediaItem]) -> None:
        """Positions are counted."""

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """(1, num_tokens, H) of an image's `pixels` (height, width, 3) uint8 or of a clip's `frames` (T, values)."""
        if kind == "audio":
            return self.encode_audio(tensors["frames"])[None]
        pixels = tensors["pixels"].astype(mx.float32) * (1 / 255)
        if isinstance(self.config.vision, SiglipConfig):
            return self.encode_image((pixels.transpose(2, 0, 1) - 0.5) / 0.5, (0, 0))[None]
        assert self.config.vision is not None, "an image for a model without an image encoder"
        patches, size = cut_patches(pixels, self.config.vision.patch_size)
        return self.encode_image(patches, size)[None]

    def encode_image(self, pixels: mx.array, grid: tuple[int, int]) -> mx.array:
        """What stands for one image, (tokens, H).

        Args:
            pixels: Gemma 3: (3, size, size) in -1..1. The others: (rows * columns, 3 * patch_size**2) in 0..1.
            grid: (rows, columns) of patches; Gemma 3 does not need it.
        """
        if isinstance(self.config.vision, SiglipConfig):
            return self.multi_modal_projector(self.vision_tower(pixels[None]))[0]
        if isinstance(self.config.vision, UnifiedVisionConfig):
            return self.embed_vision(pixels, grid)
        return self.embed_vision(self.vision_tower(pixels, grid))

    def encode_audio(self, frames: mx.array) -> mx.array:
        """What stands for one clip: (ceil(T / 4), H) of log-mel frames (T, mels), (T, H) of raw ones (T, samples)."""
        if isinstance(self.config.audio, UnifiedAudioConfig):
            return self.embed_audio(frames.astype(self.language_model.model.norm.weight.dtype))
        return self.embed_audio(self.audio_tower(frames))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names, of transformers 4 and 5, and MLX's, to this model's.

        Encoders that the checkpoint holds no weights of are dropped: text-only conversions keep their configuration.
        """
        named = {canonical_name(name, ENCODER_PARTS): weight for name, weight in weights.items()}
        text = {n.removeprefix("language_model."): w for n, w in named.items() if n.startswith("language_model.")}
        made = {f"language_model.{name}": weight for name, weight in self.language_model.sanitize(text).items()}
        for parts in (IMAGE_PARTS, AUDIO_PARTS):
            own = {n: w for n, w in named.items() if n.startswith(tuple(f"{part}." for part in parts))}
            encoders = [self[part] for part in parts if part in self]
            if encoders and own:
                convert = getattr(encoders[0], "sanitize", None)
                made |= own if convert is None else convert(own)
            else:
                for part in parts:
                    self.pop(part, None)
        return made
