"""A prompt's media: read, decoded and prepared off the event loop, their placeholders expanded."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from frontend.media.decode import decode_image
from frontend.media.parts import MediaPart
from frontend.media.processors.base import Processed, Processor
from shared.config import Settings
from shared.errors import InvalidRequest
from shared.messages import MediaItem, MediaTensor

MAX_ITEMS = 64  # of one request
MAX_PREPARED_BYTES = 48 * 1024 * 1024  # of one request's arrays, which go to the target in one message
NUM_THREADS = 2  # each decodes one item at a time: memory has a bound, whatever comes in


@dataclass(frozen=True)
class Loaded:
    """A request's media in order, not placed yet."""

    items: list[MediaItem]
    leads: list[list[str]]  # of each item of a kind of `Processor.led`: what the prompt says before each of its parts


class MediaLoader:
    """Args:
    processor: of the model that is served.
    """

    def __init__(self, processor: Processor, settings: Settings) -> None:
        self._processor = processor
        self._settings = settings
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="media")

    @property
    def modalities(self) -> list[str]:
        return list(self._processor.modalities)

    def template_part(self, part: MediaPart) -> dict[str, str]:
        """As `Processor.template_part`."""
        return self._processor.template_part(part.kind)

    def check(self, parts: Sequence[MediaPart]) -> None:
        """Before any work is done.

        Raises:
            InvalidRequest: too many items, or a kind that the model does not take.
        """
        if len(parts) > MAX_ITEMS:
            raise InvalidRequest(
                f"messages: {len(parts)} images, videos and clips; {MAX_ITEMS} are allowed", param="messages"
            )
        for part in parts:
            if part.kind not in self._processor.modalities:
                raise InvalidRequest(
                    f"{part.param}: {part.kind} input is not supported for this model", param=part.param
                )

    async def load(self, parts: Sequence[MediaPart]) -> Loaded:
        """Raises:
        InvalidRequest: an item cannot be read, decoded or prepared.
        """
        self.check(parts)
        loaded = Loaded([], [])
        num_bytes = 0
        for part in parts:  # one after the other: a request cannot keep the threads from the others
            data = await part.read(self._settings)
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, part, data)
            items = [make_item(part, processed) for processed in found]
            num_bytes += sum(len(tensor.data) for item in items for tensor in item.tensors)
            if num_bytes > MAX_PREPARED_BYTES:
                raise InvalidRequest(
                    "messages: the images and videos of this request are too large together", param="messages"
                )
            loaded.items.extend(items)
            if part.kind in self._processor.led:
                loaded.leads.append([processed.lead for processed in found])
        return loaded

    def rewrite(self, prompt: str, loaded: Loaded) -> str:
        """As `Processor.rewrite`, which may raise InvalidRequest."""
        return self._processor.rewrite(prompt, loaded.leads)

    def _prepare(self, part: MediaPart, data: bytes) -> list[Processed]:
        try:
            match part.kind:
                case "audio":
                    return [self._processor.audio(data, part.param)]
                case "video":
                    return self._processor.video(data, part.param)
                case "image":
                    return self._processor.tiles(decode_image(data, part.param))
        except InvalidRequest as error:
            told = error.message if error.message.startswith(part.param) else f"{part.param}: {error.message}"
            raise InvalidRequest(told, param=part.param) from error

    def place(self, token_ids: list[int], loaded: Loaded) -> tuple[list[int], list[MediaItem]]:
        """A rendered prompt's tokens with each placeholder repeated as often as its item has rows, and the items.

        Raises:
            InvalidRequest: the prompt does not name each item once.
        """
        items = loaded.items
        placeholders = self._processor.placeholders
        known = set(placeholders.values())
        expanded: list[int] = []
        placed: list[MediaItem] = []
        for token in token_ids:
            if token not in known:
                expanded.append(token)
                continue
            item = items[len(placed)] if len(placed) < len(items) else None
            if item is None or placeholders[item.kind] != token:
                text = "messages: the prompt has a placeholder without an image, clip or video"
                raise InvalidRequest(text, param="messages")
            tokens, offset = self._processor.expansion(item.kind, item.num_tokens, item.grid)
            placed.append(msgspec.structs.replace(item, start=len(expanded) + offset))
            expanded += tokens
        if len(placed) != len(items):
            text = f"messages: the chat template shows {len(placed)} of {len(items)} images, videos and clips"
            raise InvalidRequest(text, param="messages")
        return expanded, placed


def make_item(part: MediaPart, processed: Processed) -> MediaItem:
    """Not placed yet. Equal content gives an equal hash, whatever file it came in."""
    digest = hashlib.sha256(repr((part.kind, processed.grid, processed.seconds_per_grid)).encode())
    tensors = []
    for name, array in sorted(processed.arrays.items()):
        data = array.tobytes()
        digest.update(repr((name, str(array.dtype), array.shape)).encode())
        digest.update(data)
        tensors.append(MediaTensor(name=name, dtype=str(array.dtype), shape=list(array.shape), data=data))
    return MediaItem(
        kind=part.kind,
        start=0,
        num_tokens=processed.num_tokens,
        content_hash=digest.digest(),
        tensors=tensors,
        grid=processed.grid,
        seconds_per_grid=processed.seconds_per_grid,
    )
