"""Idefics3's and SmolVLM's images: cut into square tiles, and the whole in the size of a tile behind them.

Every tile is an item of its own, with its place in the text before it, so that chunks, cache and encoder need to know
nothing of it. The target scales the pixels, so that 3 bytes a pixel travel instead of 12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.base import Processed, Processor
from shared.messages import MediaKind

MODEL_TYPES = ("idefics3", "smolvlm")

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
MAX_EDGE = 4096  # transformers shrinks what is longer
DEFAULT_EDGE, DEFAULT_TILE = 4 * 364, 364


@dataclass(frozen=True, kw_only=True)
class Idefics3Processor(Processor):
    """Args:
    longest_edge: of an image before it is cut.
    tile_edge: of a tile, in pixels.
    is_split: False: the whole is all that the model sees.
    mean, std: of channels in 0..1.
    tile_grid: patches down and across a tile.
    num_tile_tokens: of every tile.
    """

    longest_edge: int
    tile_edge: int
    is_split: bool
    resampling: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tile_grid: int
    num_tile_tokens: int
    image_token_id: int

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return ("image",)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        return {"image": self.image_token_id}

    def image(self, picture: Image.Image) -> Processed:
        """An RGB image as one tile."""
        return self._tile(picture, AROUND + WHOLE)

    def image_parts(self, picture: Image.Image) -> list[Processed]:
        """Its tiles row by row, then the whole; only the whole, where that is not larger than a tile.

        Resized once to the longest edge and once to full tiles, as transformers does: the pixels are those of both.
        """
        height, width = scaled_to(picture.height, picture.width, self.longest_edge)
        resized = picture.resize((width, height), self.resampling)
        if not self.is_split:
            return [self.image(resized)]
        edge = self.tile_edge
        height, width = full_tiles(height, width, edge)
        resized = resized.resize((width, height), self.resampling)
        if max(height, width) <= edge:
            return [self.image(resized)]
        tiles = [
            self._tile(
                resized.crop((x, y, x + edge, y + edge)),
                ("\n" if x == 0 and y > 0 else "") + f"{AROUND}<row_{y // edge + 1}_col_{x // edge + 1}>",
            )
            for y in range(0, height, edge)
            for x in range(0, width, edge)
        ]
        return [*tiles, self._tile(resized, f"\n\n{AROUND}{WHOLE}")]

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """Each tile behind its place in the image. A prompt that does not name each image once is left as it is."""
        pieces = prompt.split(IMAGE)
        if len(pieces) != len(leads) + 1:
            return prompt
        told = ["".join(lead + IMAGE for lead in parts) + AROUND for parts in leads]
        return "".join(text for both in zip(pieces, [*told, ""], strict=True) for text in both)

    def _tile(self, picture: Image.Image, lead: str) -> Processed:
        """Resized to a tile, where it is not one."""
        arrays: dict[str, np.ndarray] = {
            "pixels": np.asarray(picture.resize((self.tile_edge, self.tile_edge), self.resampling), dtype=np.uint8),
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
        }
        return Processed(arrays, [1, self.tile_grid, self.tile_grid], self.num_tile_tokens, lead=lead)


def scaled_to(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) with this longest edge and about this shape; the other edge is even, or 1."""
    ratio = width / height
    if width >= height:
        height, width = int(longest / ratio), longest
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    return max(height, 1), max(width, 1)


def full_tiles(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) in whole tiles; the other edge follows the longer one before it is rounded up."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / edge) * edge
        height = math.ceil(int(width / ratio) / edge) * edge
    else:
        height = math.ceil(height / edge) * edge
        width = math.ceil(int(height * ratio) / edge) * edge
    return height, width


def from_configs(config: dict[str, Any], processor_config: dict[str, Any]) -> Idefics3Processor | None:
    """From config.json and the settings of the image processor; None for a conversion that has text only.

    Raises KeyError and such where they are malformed, or ask for something that is not computed.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    settings = processor_config.get("image_processor") or processor_config
    if not settings.get("do_resize", True) or not settings.get("do_rescale", True):
        raise ValueError("images that are not resized or not rescaled are not supported")
    if round(1 / float(settings.get("rescale_factor") or 1 / 255), 3) != 255:
        raise ValueError("a rescale_factor other than 1/255 is not supported")
    longest, edge = _edge(settings, "size", DEFAULT_EDGE), _edge(settings, "max_image_size", DEFAULT_TILE)
    patch, scale = int(vision.get("patch_size", 32)), int(config.get("scale_factor", 2))
    grid = edge // patch
    if grid < 1 or grid % scale:
        raise ValueError(f"tiles of {edge} pixels do not become whole tokens of {scale} x {scale} patches of {patch}")
    num_tokens = (grid // scale) ** 2
    if int(processor_config.get("image_seq_len") or num_tokens) != num_tokens:
        raise ValueError(f"image_seq_len {processor_config['image_seq_len']}, but a tile has {num_tokens} tokens")
    is_normalised = settings.get("do_normalize", True)
    return Idefics3Processor(
        longest_edge=longest,
        tile_edge=edge,
        is_split=bool(settings.get("do_image_splitting", True)),
        resampling=Image.Resampling(int(settings.get("resample", Image.Resampling.LANCZOS))),
        mean=_channels(settings, "image_mean", 0.5) if is_normalised else (0.0,) * 3,
        std=_channels(settings, "image_std", 0.5) if is_normalised else (1.0,) * 3,
        tile_grid=grid,
        num_tile_tokens=num_tokens,
        image_token_id=int(config.get("image_token_id", 128_257)),
    )


def _edge(settings: dict[str, Any], name: str, default: int) -> int:
    size = settings.get(name) or {"longest_edge": default}
    edge = int(size["longest_edge"])
    if not 0 < edge <= MAX_EDGE:
        raise ValueError(f"{name}: an edge of {edge} pixels is not supported")
    return edge


def _channels(settings: dict[str, Any], name: str, default: float) -> tuple[float, ...]:
    values = tuple(float(x) for x in settings.get(name) or (default,) * 3)
    if len(values) != 3:
        raise ValueError(f"{name}: {len(values)} numbers for 3 channels")
    return values
