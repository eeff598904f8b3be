"""Gemma's images and clips: 8 bits a channel, and frames. The target scales and cuts pixels into patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.audio import decode
from frontend.media.gemma_images import Gemma3Images, Gemma3nImages, Gemma4Images
from frontend.media.log_mel import LogMel
from frontend.media.processors.base import Processed, Processor
from frontend.media.raw_frames import RawFrames
from shared.messages import MediaKind

MODEL_TYPES = ("gemma3", "gemma3n", "gemma4", "gemma4_unified")
# What has an empty line on both sides, which has to be there when the text is tokenized.
SPACED = {"gemma3": ("<start_of_image>",), "gemma3n": ("<audio_soft_token>", "<image_soft_token>")}
MAX_CLIP_S = 30.0  # transformers' feature extractor cuts behind it; here longer audio is refused

GEMMA4_TOKEN_IDS = {
    "image": 258_880, "boi": 255_999, "eoi": 258_882, "audio": 258_881, "boa": 256_000, "eoa": 258_883,
}  # fmt: skip
DEFAULT_TOKEN_IDS = {
    "gemma3": {"image": 262_144, "boi": 255_999, "eoi": 256_000},
    "gemma3n": {
        "image": 262_145, "boi": 255_999, "eoi": 262_144, "audio": 262_273, "boa": 256_000, "eoa": 262_272,
    },
    "gemma4": GEMMA4_TOKEN_IDS,
    "gemma4_unified": GEMMA4_TOKEN_IDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GemmaProcessor(Processor):
    """Args:
    repeated: the token that stands once for each row, by kind.
    around: the tokens before and after those, by kind.
    is_opened: the template writes the token before an image (Gemma 3), not the one that is repeated.
    num_clip_tokens: of every clip (Gemma 3n); 0: as its length says.
    spaced: as `SPACED`.
    """

    images: Gemma3Images | Gemma4Images | None
    num_image_tokens: int  # of every image: Gemma 3 and 3n
    frames: LogMel | RawFrames | None
    repeated: dict[MediaKind, int]
    is_opened: bool
    around: dict[MediaKind, tuple[int, int]]
    num_clip_tokens: int = 0
    spaced: tuple[str, ...] = ()
    max_clip_s: float = MAX_CLIP_S

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return tuple(self.repeated)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        return {kind: self.around[kind][0] if self.is_opened else token for kind, token in self.repeated.items()}

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """With empty lines around media, for the models that were trained so."""
        for text in self.spaced:
            prompt = prompt.replace(text, f"\n\n{text}\n\n")
        return prompt

    def expansion(self, kind: MediaKind, num_tokens: int, grid: Sequence[int] = ()) -> tuple[list[int], int]:
        before, after = self.around[kind]
        return [before, *[self.repeated[kind]] * num_tokens, after], 1

    def image(self, picture: Image.Image) -> Processed:
        """An RGB image."""
        assert self.images is not None, "an image for a model without an image encoder"
        pixels = self.images.resized(picture)
        if isinstance(self.images, Gemma3nImages):
            scales = {"mean": self.images.mean, "std": self.images.deviation}
            arrays: dict[str, np.ndarray] = {
                "pixels": pixels,
                **{name: np.array(values, np.float32) for name, values in scales.items()},
            }
            return Processed(arrays, [1, 1, 1], self.num_image_tokens)
        if isinstance(self.images, Gemma3Images):
            return Processed({"pixels": pixels}, [1, 1, 1], self.num_image_tokens)
        grid = self.images.grid(pixels)
        return Processed({"pixels": pixels}, [1, *grid], self.images.num_tokens(grid))

    def audio(self, data: bytes, param: str) -> Processed:
        assert self.frames is not None, "a clip for a model without an audio encoder"
        samples = decode(data, self.frames.rate, self.max_clip_s, param)
        num_tokens = self.num_clip_tokens or self.frames.num_tokens(len(samples))
        return Processed({"frames": self.frames(samples, param)}, [], num_tokens)


def from_configs(config: dict[str, Any], processor_config: dict[str, Any]) -> GemmaProcessor:
    """From config.json and the settings of image processor and feature extractor.

    Args:
        processor_config: processor_config.json with its sections, or an older preprocessor_config.json.
    Raises:
        KeyError, TypeError, ValueError: malformed.
    """
    model_type = config["model_type"]
    ids = {name: _token_id(config, name, default) for name, default in DEFAULT_TOKEN_IDS[model_type].items()}
    section = processor_config.get("image_processor") or processor_config
    images: Gemma3Images | Gemma4Images | None = None
    repeated: dict[MediaKind, int] = {}
    around: dict[MediaKind, tuple[int, int]] = {}
    num_image_tokens = int(config.get("mm_tokens_per_image") or config.get("vision_soft_tokens_per_image") or 256)
    if config.get("vision_config") is not None:
        repeated["image"], around["image"] = ids["image"], (ids["boi"], ids["eoi"])
        if model_type == "gemma3":
            images = Gemma3Images(int(config["vision_config"].get("image_size") or 896))
        elif model_type == "gemma3n":
            images = Gemma3nImages.from_hf(section, num_image_tokens)
        else:
            vision = config["vision_config"]
            images = Gemma4Images(
                patch_size=int(vision.get("patch_size") or 16),
                pooling=int(vision.get("pooling_kernel_size") or 3),
                max_soft_tokens=int(section.get("max_soft_tokens") or 280),
            )
            _check_sizes(config, images)
    frames: LogMel | RawFrames | None = None
    if model_type != "gemma3" and (audio := config.get("audio_config")) is not None:
        repeated["audio"], around["audio"] = ids["audio"], (ids["boa"], ids["eoa"])
        # Gemma 3n's older checkpoints hold both processors' settings in one object.
        extractor = processor_config.get("feature_extractor") or (processor_config if model_type == "gemma3n" else {})
        if model_type == "gemma4_unified":
            frames = RawFrames(int(audio.get("audio_embed_dim") or 640), int(extractor.get("sampling_rate") or 16_000))
        else:
            frames = LogMel.from_hf(extractor, is_gemma3n=model_type == "gemma3n")
    return GemmaProcessor(
        images=images,
        num_image_tokens=num_image_tokens,
        frames=frames,
        repeated=repeated,
        is_opened=model_type == "gemma3",
        around=around,
        num_clip_tokens=int(config.get("audio_soft_tokens_per_image") or 188) if model_type == "gemma3n" else 0,
        spaced=SPACED.get(model_type, ()),
    )


def _check_sizes(config: dict[str, Any], images: Gemma4Images) -> None:
    """Raises ValueError: an image could be longer than the table of positions, or than what its tokens see."""
    most, vision = images.max_soft_tokens, config["vision_config"]
    if config["model_type"] == "gemma4":
        longest, known = most * images.pooling, int(vision.get("position_embedding_size") or 10_240)
    else:  # positions of tokens, not of the patches in them
        longest, known = most, int(vision.get("mm_posemb_size") or 1120)
        text = config.get("text_config") or {}
        window = int(text.get("sliding_window") or 1024)
        if most > window and text.get("use_bidirectional_attention", "vision") == "vision":
            raise ValueError(f"max_soft_tokens {most} passes sliding_window {window}; that is not supported")
    if longest > known:
        raise ValueError(f"max_soft_tokens {most} needs {longest} positions, the encoder has {known}")


def _token_id(config: dict[str, Any], name: str, default: int) -> int:
    """Configurations say `..._token_id` or, older ones, `..._token_index`."""
    found = config.get(f"{name}_token_id", config.get(f"{name}_token_index"))
    return default if found is None else int(found)
