"""Checks a request's media before they reach a target."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from shared.messages import MediaItem, MediaKind, Submit, WorkerInfo
from shared.wire import DTYPE_BYTES


def media_fault(submit: Submit, info: WorkerInfo) -> str | None:
    """What is wrong with the media of a request; None: nothing."""
    end = 0
    for item in submit.media:
        if item.kind not in info.modalities:
            return f"this model takes no {item.kind} input"
        if item.start < end or item.num_tokens < 1 or item.start + item.num_tokens > len(submit.prompt_token_ids):
            return "media overlap each other or lie outside the prompt"
        if item.kind in info.whole_media and item.num_tokens > info.max_step_tokens:
            return f"an {item.kind} of {item.num_tokens} tokens does not fit into a step of {info.max_step_tokens}"
        if not all(_fills_its_shape(item, i) for i in range(len(item.tensors))):
            return "an array of a media item does not fill its shape"
        end = item.start + item.num_tokens
    return None


def whole_end(media: Sequence[MediaItem], kinds: Collection[MediaKind], first: int, end: int) -> int:
    """Where a prefill chunk first .. end-1 has to stop so that it cuts no item of these kinds."""
    for item in media:
        behind = item.start + item.num_tokens
        if item.kind in kinds and item.start < end < behind:
            return item.start if item.start > first else behind
    return end


def _fills_its_shape(item: MediaItem, index: int) -> bool:
    tensor = item.tensors[index]
    size = DTYPE_BYTES.get(tensor.dtype)
    return size is not None and min(tensor.shape, default=1) >= 0 and math.prod(tensor.shape) * size == len(tensor.data)
