"""Idefics3's and SmolVLM's images: cut into square tiles, and the whole in the size of a tile behind them.

Every tile is an item of its own, with its place in the text before it, so that chunks, cache and encoder need to know
nothing of it. So is every frame of a video. The target scales the pixels, so that 3 bytes a pixel travel instead of 12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from frontend.media.processors.base import Processed, Processor
from frontend.media.processors.idefics3_video import DEFAULT_EDGE, FrameRules, frame_leads, rules_of
from frontend.media.video import Plan, Source, decode_video
from shared.errors import InvalidRequest
from shared.messages import MediaKind

MODEL_TYPES = ("idefics3", "smolvlm")

IMAGE, AROUND, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
VIDEO = "<the video of this place>"  # ours, written as text: the released templates know no videos
VIDEO_END = "\n\n"
MAX_EDGE = 4096  # transformers shrinks what is longer
DEFAULT_TILE = 364


@dataclass(frozen=True, kw_only=True)
class Idefics3Processor(Processor):
    """Args:
    longest_edge: of an image before it is cut.
    tile_edge: of a tile, in pixels.
    is_split: False: the whole is all that the model sees.
    mean, std: of channels in 0..1.
    tile_grid: patches down and across a tile.
    num_tile_tokens: of every tile.
    frame_rules: None for a checkpoint that takes no videos.
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
    frame_rules: FrameRules | None = None

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return ("image", "video") if self.frame_rules is not None else ("image",)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        return dict.fromkeys(self.modalities, self.image_token_id)

    @property
    def led(self) -> tuple[MediaKind, ...]:
        return ("image", "video")

    def template_part(self, kind: MediaKind) -> dict[str, str]:
        return {"type": "text", "text": VIDEO} if kind == "video" else {"type": kind}

    def image(self, picture: Image.Image) -> Processed:
        """An RGB image as one tile."""
        return self._tile(picture, AROUND + WHOLE)

    def tiles(self, picture: Image.Image) -> list[Processed]:
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

    def video(self, data: bytes, param: str) -> list[Processed]:
        """Its frames, each as one tile.

        Raises:
            InvalidRequest: it cannot be read, or is too large.
        """
        rules = self.frame_rules
        assert rules is not None, "the request's kinds were checked"

        def plan(source: Source) -> Plan:
            return rules.plan(source, self.tile_edge, scaled_to(source.height, source.width, rules.longest_edge))

        frames, source, indices = decode_video(data, param, plan)
        leads = frame_leads(indices, source, before=AROUND + WHOLE, behind=AROUND)
        return [self._processed(frame, lead) for frame, lead in zip(frames, leads, strict=True)]

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """Each tile behind its place in the image, each frame behind its time.

        Raises:
            InvalidRequest: the prompt does not name each image and video once.
        """
        pieces = re.split(f"({IMAGE}|{VIDEO})", prompt)  # text, mark, text, ..., mark, text
        if len(pieces) != 2 * len(leads) + 1:
            told = f"messages: the prompt has {len(pieces) // 2} places for {len(leads)} images and videos"
            raise InvalidRequest(told, param="messages")
        for i, parts in enumerate(leads):
            end = VIDEO_END if pieces[2 * i + 1] == VIDEO else ""
            pieces[2 * i + 1] = "".join(lead + IMAGE for lead in parts) + AROUND + end
        return "".join(pieces)

    def _tile(self, picture: Image.Image, lead: str) -> Processed:
        """Resized to a tile, where it is not one."""
        resized = picture.resize((self.tile_edge, self.tile_edge), self.resampling)
        return self._processed(np.asarray(resized, dtype=np.uint8), lead)

    def _processed(self, pixels: np.ndarray, lead: str) -> Processed:
        arrays: dict[str, np.ndarray] = {
            "pixels": np.ascontiguousarray(pixels),
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
    mean, std = _scales(settings)
    return Idefics3Processor(
        longest_edge=longest,
        tile_edge=edge,
        is_split=bool(settings.get("do_image_splitting", True)),
        resampling=Image.Resampling(int(settings.get("resample", Image.Resampling.LANCZOS))),
        mean=mean,
        std=std,
        tile_grid=grid,
        num_tile_tokens=num_tokens,
        image_token_id=int(config.get("image_token_id", config.get("image_token_index", 128_257))),
        frame_rules=_frame_rules(processor_config, settings) if config["model_type"] == "smolvlm" else None,
    )


def _frame_rules(processor_config: dict[str, Any], settings: dict[str, Any]) -> FrameRules | None:
    """Older checkpoints have one file for images and videos.

    Raises ValueError: frames would become other tiles than images do.
    """
    own = processor_config.get("video_processor") or settings
    rules = rules_of(own)
    if rules is not None:
        edges = _edge(own, "max_image_size", DEFAULT_TILE), _edge(settings, "max_image_size", DEFAULT_TILE)
        if edges[0] != edges[1] or _scales(own) != _scales(settings):
            raise ValueError("frames of another size or other scales than the tiles of images are not supported")
    return rules


def _edge(settings: dict[str, Any], name: str, default: int) -> int:
    size = settings.get(name) or {"longest_edge": default}
    edge = int(size["longest_edge"])
    if not 0 < edge <= MAX_EDGE:
        raise ValueError(f"{name}: an edge of {edge} pixels is not supported")
    return edge


def _scales(settings: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the channels."""
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3
    mean, std = (tuple(float(x) for x in settings.get(f"image_{name}") or (0.5,) * 3) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"{len(mean)} means and {len(std)} deviations for 3 channels")
    return mean, std
