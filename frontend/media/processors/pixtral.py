"""Images of Mistral 3, Ministral 3 and Pixtral: shrunk to a largest edge, stretched to whole tokens, 8 bits a channel.

In a prompt each row of an image ends in a token of text, the last one in another; they count as the image's, so that
the target gets one item for an image and fills in the embeddings of both kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.base import ImageProcessor, Processed
from shared.errors import InvalidRequest
from shared.messages import MediaKind

MODEL_TYPES = ("mistral3", "llava", "pixtral")
# Text decoders that see images in Tandem; mlx-lm's, and encoders other than Pixtral's, are served as text.
TEXT_TYPES = ("llama", "mistral", "ministral3", "qwen2", "qwen3")

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}


@dataclass(frozen=True, kw_only=True)
class PixtralProcessor(ImageProcessor):
    """Args:
    merge_size: patches a side of one token.
    max_height, max_width: pixels, before the image is stretched to whole tokens.
    resample: one of Pillow's.
    mean, std: of channels in 0..1.
    row_break_id, image_end_id: what stands behind each row, and behind the last one.
    """

    patch_size: int
    merge_size: int
    max_height: int
    max_width: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_token_id: int
    row_break_id: int
    image_end_id: int

    def image(self, picture: Image.Image) -> Processed:
        """Raises:
        InvalidRequest: it is so narrow that nothing is left of it at the largest size.
        """
        height, width = picture.height, picture.width
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if not height or not width:
            raise InvalidRequest(f"it is {picture.width} x {picture.height} pixels, too narrow for this model")
        side = self.patch_size * self.merge_size
        rows, columns = -(-height // side), -(-width // side)
        resized = picture.resize((columns * side, rows * side), self.resample)
        arrays: dict[str, np.ndarray] = {
            "pixels": np.asarray(resized, dtype=np.uint8),
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
            "row_break": np.array([self.row_break_id], dtype=np.int32),
        }
        return Processed(arrays, [1, rows * self.merge_size, columns * self.merge_size], rows * (columns + 1) - 1)

    def expansion(self, kind: MediaKind, num_tokens: int, grid: Sequence[int] = ()) -> tuple[list[int], int]:
        row = [self.image_token_id] * (grid[2] // self.merge_size) + [self.row_break_id]
        tokens = row * (grid[1] // self.merge_size)
        assert len(tokens) == num_tokens + 1, "all but the token that ends the image are the item's"
        return [*tokens[:-1], self.image_end_id], 0


def from_configs(
    config: dict[str, Any], settings: dict[str, Any], token_id: Callable[[str], int | None]
) -> PixtralProcessor | None:
    """From config.json and the settings of processor and image processor; None for a model that is served as text.

    Args:
        settings: processor_config.json, with its sections or with an older preprocessor_config.json over it.
        token_id: of the tokenizer.
    Raises:
        KeyError, TypeError, ValueError: malformed, or something that is not done here.
    """
    vision = config.get("vision_config")
    if vision is None or vision.get("model_type", None if config["model_type"] == "llava" else "pixtral") != "pixtral":
        return None
    if (config.get("text_config") or {}).get("model_type", "mistral") not in TEXT_TYPES:
        return None
    image_id, row_break_id, image_end_id = (token_id(_text(settings, name, text)) for name, text in _TOKENS.items())
    if image_id is None or row_break_id is None or image_end_id is None:
        return None  # a tokenizer of text
    told = config.get("image_token_id", config.get("image_token_index"))
    if told is not None and told != image_id:
        raise ValueError(f"image token {told} of the model is {image_id} in the tokenizer")
    section = settings.get("image_processor") or settings
    _check(section)
    merge_size = int(config.get("spatial_merge_size", 2)) if config["model_type"] == "mistral3" else 1
    if int(settings.get("spatial_merge_size", merge_size)) != merge_size:
        raise ValueError(f"spatial_merge_size {settings['spatial_merge_size']}, the model's is {merge_size}")
    max_height, max_width = _largest(section, vision)
    return PixtralProcessor(
        patch_size=int(vision.get("patch_size", 16)),
        merge_size=merge_size,
        max_height=max_height,
        max_width=max_width,
        resample=Image.Resampling(section.get("resample", Image.Resampling.BICUBIC)),
        mean=tuple(float(x) for x in section.get("image_mean") or _CLIP_MEAN),
        std=tuple(float(x) for x in section.get("image_std") or _CLIP_STD),
        image_token_id=image_id,
        row_break_id=row_break_id,
        image_end_id=image_end_id,
    )


def _text(settings: dict[str, Any], name: str, default: str) -> str:
    """A token's text; some files have an object around it."""
    found = settings.get(name, default)
    return str(found["content"] if isinstance(found, dict) else found)


def _check(section: dict[str, Any]) -> None:
    """Raises ValueError: images would be prepared in another way."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if section.get(step) is False:
            raise ValueError(f"{step}: false is not supported")
    if section.get("do_center_crop"):
        raise ValueError("do_center_crop is not supported")
    if not math.isclose(section.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise ValueError(f"rescale_factor {section['rescale_factor']} is not supported, only 1 / 255")


def _largest(section: dict[str, Any], vision: dict[str, Any]) -> tuple[int, int]:
    """Height and width that no image passes, in pixels; without settings the size that the encoder was trained on."""
    size = section.get("size") or {"longest_edge": vision.get("image_size", 1024)}
    height, width = (int(size.get("longest_edge") or size[side]) for side in ("height", "width"))
    if height < 1 or width < 1:
        raise ValueError(f"size {size}")
    return height, width
