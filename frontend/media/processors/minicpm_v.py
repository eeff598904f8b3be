"""MiniCPM-V's images: resized to about one area, and large ones also cut into slices of about that area.

The whole picture and each slice are items of their own between markers in the prompt: an encoder run is short, and
chunks, cache and target need to know nothing of slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.areas import check_ratio
from frontend.media.processors.base import ImageProcessor, Processed
from frontend.media.processors.placeholders import replaced

MODEL_TYPES = ("minicpmv4_6",)

PLACEHOLDER = "<|image_pad|>"
START, END = "<image>", "</image>"
SLICE_START, SLICE_END = "<slice>", "</slice>"
ID_START, ID_END = "<image_id>", "</image_id>"

_MEAN = _STD = (0.5, 0.5, 0.5)
_SCALED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}


@dataclass(frozen=True, kw_only=True)
class MiniCpmVProcessor(ImageProcessor):
    """Args:
    token_size: patches along a side of the square that one token stands for.
    edge: of a square of the area that a picture, or a slice of one, is resized to, in pixels.
    max_slices: of one picture; none is cut where it is 1.
    has_numbers: the prompt numbers a conversation's pictures.
    mean, std: of channels in 0..1.
    """

    patch_size: int = 14
    token_size: int = 4
    edge: int = 448
    max_slices: int = 9
    has_numbers: bool = True
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    image_token_id: int

    def image(self, picture: Image.Image) -> Processed:
        """The whole picture in one piece.

        Raises:
            InvalidRequest: it is more than 200 times as long as wide.
        """
        check_ratio(picture.height, picture.width)
        return self._processed(self._resized(picture, *self.fitting_size(picture.height, picture.width)), START)

    def tiles(self, picture: Image.Image) -> list[Processed]:
        """The whole picture, then its slices row by row.

        Raises:
            InvalidRequest: as `image`.
        """
        whole = self.image(picture)
        rows, columns = self.grid(picture.height, picture.width)
        if rows * columns == 1:
            return [whole]
        height, width = self.slice_size(picture.height, picture.width, rows, columns)
        pixels = self._resized(picture, height * rows, width * columns)
        leads = [END + SLICE_START] + [SLICE_END + SLICE_START] * (rows * columns - 1)
        for first in range(columns, rows * columns, columns):
            leads[first] = f"{SLICE_END}\n{SLICE_START}"
        slices = [
            pixels[y : y + height, x : x + width]
            for y in range(0, height * rows, height)
            for x in range(0, width * columns, width)
        ]
        return [whole, *(self._processed(part, lead) for part, lead in zip(slices, leads, strict=True))]

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """A placeholder for each part between its markers, in place of each picture's one.

        Raises:
            InvalidRequest: the prompt does not name each picture once.
        """
        pictures = []
        for i, parts in enumerate(leads):
            number = f"{ID_START}{i}{ID_END}" if self.has_numbers else ""
            end = END if len(parts) == 1 else SLICE_END
            pictures.append(number + "".join(lead + PLACEHOLDER for lead in parts) + end)
        return replaced(prompt, PLACEHOLDER, pictures)

    def fitting_size(self, height: float, width: float) -> tuple[int, int]:
        """(height, width) of about the area of a square of `edge` pixels, in whole tokens.

        Source: `find_best_resize` of transformers' image processor. It keeps small pictures small only where they are
        cut as well, which they never are.
        """
        ratio = width / height
        new_height = int(self.edge / math.sqrt(ratio))
        return self._whole(new_height), self._whole(int(new_height * ratio))

    def slice_size(self, height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) of each slice of a grid. Source: `get_refine_size` of transformers' image processor."""
        return self.fitting_size(_divided(height, rows) / rows, _divided(width, columns) / columns)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of slices; (1, 1) for a picture that is not cut.

        Source: `get_sliced_grid` of transformers' image processor.
        """
        wanted = min(math.ceil(width * height / self.edge**2), self.max_slices)
        if wanted <= 1:
            return 1, 1
        counts = [n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= self.max_slices]
        grids = [(rows, n // rows) for n in counts for rows in range(1, n + 1) if n % rows == 0]
        log_ratio = math.log(width / height)
        return min(grids, key=lambda grid: (abs(log_ratio - math.log(grid[1] / grid[0])), -grid[0]))

    def _whole(self, length: int) -> int:
        side = self.patch_size * self.token_size
        return max(round(length / side), 1) * side

    def _resized(self, picture: Image.Image, height: int, width: int) -> np.ndarray:
        return np.asarray(picture.resize((width, height), self.resampling), dtype=np.uint8)

    def _processed(self, pixels: np.ndarray, lead: str) -> Processed:
        """Pixels (height, width, 3) uint8, which the target scales."""
        rows, columns = pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size
        arrays: dict[str, np.ndarray] = {
            "pixels": np.ascontiguousarray(pixels),
            "mean": np.array(self.mean, dtype=np.float32),
            "std": np.array(self.std, dtype=np.float32),
        }
        return Processed(arrays, [1, rows, columns], rows * columns // self.token_size**2, lead=lead)


def _divided(length: int, count: int) -> int:
    """The nearest multiple of `count`, at least one."""
    return max(round(length / count), 1) * count


def from_configs(
    config: dict[str, Any], settings: dict[str, Any], token_id: Callable[[str], int | None]
) -> MiniCpmVProcessor | None:
    """From config.json and the settings of the processor or its image processor; None for a model of text only.

    Args:
        token_id: of the tokenizer.
    Raises:
        KeyError, TypeError, ValueError: malformed, or something that is not done here.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    section = settings.get("image_processor") or settings
    ids = {text: token_id(text) for text in (PLACEHOLDER, START, END, SLICE_START, SLICE_END, ID_START, ID_END)}
    if missing := [text for text, found in ids.items() if found is None]:
        raise ValueError(f"the tokenizer has no token {missing[0]}")
    image_token_id = ids[PLACEHOLDER]
    assert image_token_id is not None, "it was looked for"
    if (told := config.get("image_token_id")) not in (None, image_token_id):
        raise ValueError(f"image token {told} of the model is {image_token_id} in the tokenizer")
    mode = config.get("downsample_mode") or "16x"
    if (told := section.get("downsample_mode") or mode) != mode:
        raise ValueError(f"downsample_mode {told} of the image processor, the model's is {mode}")
    for name, computed in _SCALED.items():
        if not math.isclose(section.get(name, computed), computed, rel_tol=1e-6):
            raise ValueError(f"{name} {section[name]} is not supported")
    patch_size = int(section.get("patch_size", 14))
    if patch_size != int(vision.get("patch_size") or 16):
        raise ValueError(f"patches of {patch_size} pixels are not the model's")
    is_normalised = bool(section.get("do_normalize", True))
    merges = int(config.get("merger_times", 1)) + (mode == "16x")
    made = MiniCpmVProcessor(
        patch_size=patch_size,
        token_size=2**merges,
        edge=int(section.get("scale_resolution", 448)),
        max_slices=int(section.get("max_slice_nums", 9)) if section.get("slice_mode", True) else 1,
        has_numbers=bool(section.get("use_image_id", True)),
        resampling=Image.Resampling(int(section.get("resample", Image.Resampling.BICUBIC))),
        mean=_channels(section, "image_mean", _MEAN) if is_normalised else (0.0,) * 3,
        std=_channels(section, "image_std", _STD) if is_normalised else (1.0,) * 3,
        image_token_id=image_token_id,
    )
    if made.edge < 1:
        raise ValueError(f"scale_resolution {made.edge}")
    return made


def _channels(section: dict[str, Any], name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    found = tuple(float(x) for x in section.get(name) or default)
    if len(found) != 3:
        raise ValueError(f"{name} of {len(found)} channels")
    return found
