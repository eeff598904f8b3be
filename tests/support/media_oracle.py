"""transformers' models that take media beside ours with the same weights, and ours through the cache."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from shared.messages import MediaItem, StepRow
from shared.model_files import ModelFiles
from workers.cache.store import CacheStore
from workers.load import load
from workers.media import SlotMedia

CAPACITY = 256


@dataclass
class Prompt:
    tokens: list[int]
    media: list[MediaItem]  # placed


def pair(
    transformers: Any, folder: Path, model_type: str, config: dict[str, Any], seed: int = 0, scale: float = 0.1
) -> tuple[Any, Any]:
    """transformers' model of a configuration, every parameter random, and ours, read from what it saves."""
    import torch

    built = transformers.AutoConfig.for_model(model_type, **config)
    torch.manual_seed(seed)
    reference = transformers.AutoModelForImageTextToText.from_config(built, attn_implementation="eager")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter + scale * torch.randn(parameter.shape))
    reference = reference.eval()
    reference.save_pretrained(folder)
    return reference, load(ModelFiles(name="m", folder=folder), "float32").model


def arrays_of(media: MediaItem) -> dict[str, mx.array]:
    """An item's tensors as the target gets them."""
    return {t.name: mx.array(np.frombuffer(t.data, dtype=t.dtype).reshape(t.shape)) for t in media.tensors}


def normalised(media: MediaItem) -> np.ndarray:
    """`pixels` (height, width, 3) float32 by `mean` and `std`, as the reference gets them."""
    found = {name: np.array(array) for name, array in arrays_of(media).items()}
    scaled: np.ndarray = (found["pixels"] / np.float32(255) - found["mean"]) / found["std"]
    return scaled


def our_logits(model: Any, made: Prompt, chunks: Sequence[int] = ()) -> np.ndarray:
    """(n, V) through the cache; chunks end at the positions given."""
    store = CacheStore(model.layer_specs(), [CAPACITY], CAPACITY, mx.float32, True)
    store.ensure(0, CAPACITY)
    media = SlotMedia(model)
    if made.media:
        media.bind(0, len(made.tokens), made.media)
    parts = []
    for first, end in itertools.pairwise([0, *chunks, len(made.tokens)]):
        tokens = made.tokens[first:end]
        inputs = mx.array([tokens])
        row = StepRow(slot=0, start=first, capacity=CAPACITY, token_ids=tokens)
        batch = store.open([0], [first], end - first)
        parts.append(model.logits(model.hidden(inputs, cache=batch.layers, **media.forward([row], inputs))))
        batch.close()
    return np.array(mx.concatenate(parts, axis=1))[0]
