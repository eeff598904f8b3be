"""What every family's processor gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from shared.errors import InvalidRequest
from shared.messages import MediaKind


@dataclass(frozen=True)
class Processed:
    """One item, ready for the encoder. `arrays` go to the target as they are."""

    arrays: dict[str, np.ndarray]
    grid: list[int]  # frames, rows, columns of patches
    num_tokens: int  # that stand for it in the prompt
    seconds_per_grid: float = 1.0  # of a video: between two frames of `grid`
    lead: str = ""  # of a part of an item of a kind of `Processor.led`: what the prompt says before it


class Processor(Protocol):
    """One family's settings."""

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        """What it prepares."""

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        """The token that stands once for each item in the prompt that `rewrite` gives; kinds may share one."""

    def template_part(self, kind: MediaKind) -> dict[str, str]:
        """What the chat template is given in an item's place."""
        return {"type": kind}

    def image(self, picture: Image.Image) -> Processed:
        """An RGB image.

        Raises:
            InvalidRequest: its form does not suit the model.
        """

    def tiles(self, picture: Image.Image) -> list[Processed]:
        """An RGB image in one part or several, each an item of its own.

        Raises:
            InvalidRequest: as `image`.
        """
        return [self.image(picture)]

    def audio(self, data: bytes, param: str) -> Processed:
        """An audio file.

        Raises:
            InvalidRequest: it cannot be read, or is too short or too long for the model.
        """
        raise InvalidRequest("audio input is not supported for this model", param=param)

    def video(self, data: bytes, param: str) -> list[Processed]:
        """A video file, in one part or several.

        Raises:
            InvalidRequest: it cannot be read, or its form does not suit the model.
        """
        raise InvalidRequest("video input is not supported for this model", param=param)

    @property
    def led(self) -> tuple[MediaKind, ...]:
        """The kinds whose parts stand in the prompt each behind its `Processed.lead`."""
        return ("video",)

    def rewrite(self, prompt: str, leads: Sequence[Sequence[str]] = ()) -> str:
        """The rendered conversation, where the family writes something around its placeholders.

        Args:
            leads: of each part of each item of the kinds `led`, in their order.
        Raises:
            InvalidRequest: it cannot be told which placeholder is whose.
        """
        return prompt

    def expansion(self, kind: MediaKind, num_tokens: int, grid: Sequence[int] = ()) -> tuple[list[int], int]:
        """What stands in a prompt for one placeholder, and where in it the item's `num_tokens` begin.

        Args:
            grid: the item's, as in `Processed`.
        """
        return [self.placeholders[kind]] * num_tokens, 0


class ImageProcessor(Processor):
    """Of a family that takes images and nothing else, each of which may come in parts behind leads."""

    image_token_id: int

    @property
    def modalities(self) -> tuple[MediaKind, ...]:
        return ("image",)

    @property
    def placeholders(self) -> dict[MediaKind, int]:
        return {"image": self.image_token_id}

    @property
    def led(self) -> tuple[MediaKind, ...]:
        return ("image",)
