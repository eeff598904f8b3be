"""LFM2-VL's images: resized to whole squares of patches within a range of tokens, large ones in tiles.

Each tile is an item of its own behind a marker in the prompt, and so is the thumbnail of the whole picture that may
follow them: an encoder run is short, and chunks, cache and target need to know nothing of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.base import ImageProcessor, Processed
from frontend.media.processors.placeholders import replaced
from shared.errors import InvalidRequest

MODEL_TYPES = ("lfm2_vl", "lfm2-vl")
PLACEHOLDER = "<image>"
START, END, THUMBNAIL = "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"
_RESAMPLING = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)  # which Pillow and PyTorch compute alike


@dataclass(frozen=True, kw_only=True)
class Lfm2VlProcessor(ImageProcessor):
    """Args:
    merge_size: so many patches along each side of a square become one token.
    min_tokens, max_tokens: of a picture in one piece, or of a thumbnail.
    tolerance: a picture that would have more than so many times `max_tokens` comes in tiles.
    tile_size: pixels along a side.
    min_tiles, max_tiles: of one picture; no picture comes in tiles where both are 1.
    has_markers: the prompt says where a picture begins and ends and which tile is which.
    mean, std: of channels in 0..1.
    """

    patch_size: int = 16
    merge_size: int = 2
    min_tokens: int = 64
    max_tokens: int = 256
    tolerance: float = 2.0
    tile_size: int = 512
    min_tiles: int = 2
    max_tiles: int = 10
    has_thumbnail: bool = True
    has_markers: bool = True
    resampling: Image.Resampling = Image.Resampling.BILINEAR
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_token_id: int = 396

    def image(self, picture: Image.Image) -> Processed:
        """The whole picture in one piece.

        Raises:
            InvalidRequest: it is too long for its width.
        """
        height, width = self.fitting_size(picture.height, picture.width)
        return self._processed(np.asarray(picture.resize((width, height), self.resampling), dtype=np.uint8))

    def tiles(self, picture: Image.Image) -> list[Processed]:
        """Raises:
        InvalidRequest: as `image`.
        """
        columns, rows = self.grid(picture.height, picture.width)
        if rows * columns == 1:
            return [replace(self.image(picture), lead=START if self.has_markers else "")]
        thumbnail = [self.image(picture)] if self.has_thumbnail else []
        size = self.tile_size
        pixels = np.asarray(picture.resize((columns * size, rows * size), self.resampling), dtype=np.uint8)
        parts = [
            self._processed(pixels[row * size : (row + 1) * size, column * size : (column + 1) * size])
            for row in range(rows)
            for column in range(columns)
        ]
        leads = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(rows) for column in range(columns)]
        parts, leads = [*parts, *thumbnail], [*leads, THUMBNAIL][: len(parts) + len(thumbnail)]
        if not self.has_markers:
            return parts
        leads[0] = START + leads[0]
        return [replace(part, lead=lead) for part, lead in zip(parts, leads, strict=True)]

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """A placeholder for each tile, behind its marker, in place of each picture's one.

        Raises:
            InvalidRequest: the prompt does not name each picture once.
        """
        end = END if self.has_markers else ""
        pictures = ["".join(lead + PLACEHOLDER for lead in parts) + end for parts in leads]
        return replaced(prompt, PLACEHOLDER, pictures)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of a square's side near the picture's own height and width, within the range of tokens.

        Raises:
            InvalidRequest: one square's side is too much for the shorter side of a picture so long.
        Source: `smart_resize` of transformers' LFM2-VL image processor, which fails for those.
        """
        side = self.patch_size * self.merge_size
        least, most = self.min_tokens * side**2, self.max_tokens * side**2
        new_height, new_width = (max(side, round(length / side) * side) for length in (height, width))
        if new_height * new_width > most:
            shrink = math.sqrt(height * width / most)
            new_height, new_width = (max(side, math.floor(length / shrink / side) * side) for length in (height, width))
        elif new_height * new_width < least:
            stretch = math.sqrt(least / (height * width))
            new_height, new_width = (math.ceil(length * stretch / side) * side for length in (height, width))
        if new_height * new_width > self._max_patches * self.patch_size**2:
            raise InvalidRequest(f"it is {width} x {height} pixels, which is too long for this model")
        return new_height, new_width

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(columns, rows) of tiles; (1, 1) for a picture that stays in one piece.

        Source: `find_closest_aspect_ratio` of transformers' LFM2-VL image processor.
        """
        side = self.patch_size * self.merge_size
        new_height, new_width = (max(self.patch_size, round(length / side) * side) for length in (height, width))
        if new_height * new_width <= self.max_tokens * side**2 * self.tolerance:
            return 1, 1
        best, least = (1, 1), math.inf
        for columns, rows in self._grids():
            difference = abs(width / height - columns / rows)
            is_full = height * width > 0.5 * self.tile_size**2 * columns * rows
            if difference < least or (difference == least and is_full):
                best, least = (columns, rows), difference
        return best

    def _grids(self) -> list[tuple[int, int]]:
        """All (columns, rows), by their number of tiles. Those of one number lie as in the reference's set."""
        counts = range(self.min_tiles, self.max_tiles + 1)
        found = {(w, h) for n in counts for w in range(1, n + 1) for h in range(1, n + 1) if w * h in counts}
        return sorted(found, key=lambda grid: grid[0] * grid[1])

    @property
    def _max_patches(self) -> int:
        """Of a picture in one piece, or of a tile."""
        of_tile = (self.tile_size // self.patch_size) ** 2 if self.max_tiles > 1 else 0
        return max(self.max_tokens * self.merge_size**2, of_tile)

    def _processed(self, pixels: np.ndarray) -> Processed:
        """Pixels (height, width, 3) uint8, which the target scales and cuts into patches."""
        rows, columns = pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size
        arrays: dict[str, np.ndarray] = {
            "pixels": np.ascontiguousarray(pixels),
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
        }
        return Processed(arrays, [1, rows, columns], rows * columns // self.merge_size**2)


def from_configs(config: dict[str, Any], settings: dict[str, Any]) -> Lfm2VlProcessor | None:
    """From config.json and the processor's settings; None for a conversion that has text only.

    The first release has the tiles' settings in processor_config.json and in config.json, later ones among the image
    processor's.

    Raises:
        KeyError, TypeError, ValueError: malformed, or something that is not computed.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    places = (settings.get("image_processor") or {}, settings, config)

    def of(name: str, default: Any) -> Any:  # noqa: ANN401 - as the files have it
        return next((place[name] for place in places if place.get(name) is not None), default)

    is_split, is_normalised = bool(of("do_image_splitting", True)), bool(of("do_normalize", True))
    made = Lfm2VlProcessor(
        patch_size=int(of("encoder_patch_size", 16)),
        merge_size=int(of("downsample_factor", 2)),
        min_tokens=int(of("min_image_tokens", 64)),
        max_tokens=int(of("max_image_tokens", 256)),
        tolerance=float(of("max_pixels_tolerance", 2.0)),
        tile_size=int(of("tile_size", 512)),
        min_tiles=int(of("min_tiles", 2)) if is_split else 1,
        max_tiles=int(of("max_tiles", 10)) if is_split else 1,
        has_thumbnail=bool(of("use_thumbnail", True)),
        has_markers=bool(of("use_image_special_tokens", True)),
        resampling=Image.Resampling(int(of("resample", Image.Resampling.BILINEAR))),
        mean=tuple(float(x) for x in of("image_mean", (0.5,) * 3)) if is_normalised else (0.0,) * 3,
        std=tuple(float(x) for x in of("image_std", (0.5,) * 3)) if is_normalised else (1.0,) * 3,
        image_token_id=int(of("image_token_id", config.get("image_token_index", 396))),
    )
    _check(made, config)
    if not of("do_rescale", True) or not math.isclose(of("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError("images that are not scaled to 0..1 are not supported")
    return made


def _check(made: Lfm2VlProcessor, config: dict[str, Any]) -> None:
    """Raises ValueError: settings that contradict each other or the model, or are not computed."""
    vision = config["vision_config"]
    sizes = (made.patch_size, made.merge_size)
    if sizes != (int(vision.get("patch_size") or 16), int(config.get("downsample_factor") or 2)):
        raise ValueError(f"patches of {sizes[0]} pixels by {sizes[1]} are not the model's")
    if not 0 < made.min_tiles <= made.max_tiles or not 0 < made.min_tokens <= made.max_tokens:
        raise ValueError("a range of tiles or tokens is empty")
    if made.max_tiles > 1 and (made.tile_size <= 0 or made.tile_size % (made.patch_size * made.merge_size)):
        raise ValueError(f"tile_size {made.tile_size} is no multiple of a token's pixels")
    if made.resampling not in _RESAMPLING:
        raise ValueError(f"resample {made.resampling.name} is not supported")
