"""The places of images in a rendered conversation."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import InvalidRequest


def replaced(prompt: str, placeholder: str, pictures: Sequence[str]) -> str:
    """The prompt with what stands for each picture in place of its placeholder.

    Raises:
        InvalidRequest: the prompt does not name each picture once.
    """
    pieces = prompt.split(placeholder)
    if len(pieces) != len(pictures) + 1:
        told = f"messages: the prompt has {len(pieces) - 1} placeholders for {len(pictures)} images"
        raise InvalidRequest(told, param="messages")
    return "".join(text for both in zip(pieces, [*pictures, ""], strict=True) for text in both)
