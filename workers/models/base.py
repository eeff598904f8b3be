"""What the worker asks of a model, and what a model asks of the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from shared.messages import MediaItem, MediaKind
from workers.cache.spec import LayerSpec
from workers.models.rope import Rotate, rotated_pair


class LayerCache(Protocol):
    """One attention layer as the rows of one forward see it."""

    @property
    def offset(self) -> int | mx.array:
        """Position of each row's first input token: one number for all rows, or (B,) int32."""

    def attend(
        self,
        q: mx.array,
        k: mx.array | None,
        v: mx.array | None,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        rotation: Rotate | None = None,
        sees_spans: bool = False,
    ) -> mx.array:
        """Write k and v, attend causally to all earlier positions, or to the last `window` of them.

        Args:
            q: (B, num_heads, L, key_dim).
            rotation: applied to q and k first, here because a kernel does it on the way; None: they are rotated.
            k, v: (B, num_kv_heads, L, key_dim or value_dim); None reads what another layer wrote in this forward.
            sinks: (num_heads,) attention sink logits.
            sees_spans: the tokens of one image see each other, later ones too, where the batch tells of images.
        Returns:
            (B, num_heads, L, value_dim)
        """


class NoCache:
    """Plain causal attention over the tokens of one call, for a model that is called without a cache."""

    offset = 0

    def __init__(self) -> None:
        self._rows: tuple[mx.array, mx.array] | None = None

    def attend(
        self,
        q: mx.array,
        k: mx.array | None,
        v: mx.array | None,
        scale: float,
        window: int | None = None,
        sinks: mx.array | None = None,
        rotation: Rotate | None = None,
        sees_spans: bool = False,
    ) -> mx.array:
        q, k = rotated_pair(q, k, rotation)
        if k is not None and v is not None:
            self._rows = k, v
        assert self._rows is not None, "shared keys were not written in this forward"
        k, v = self._rows
        length = q.shape[2]
        mask: str | mx.array | None = "causal" if length > 1 else None
        if window is not None and length > window:
            distance = mx.arange(length)[:, None] - mx.arange(length)[None]
            mask = (distance >= 0) & (distance < window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


class TextModel(Protocol):
    """Every model that a worker runs: mlx-lm's calling convention and what its layers keep."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    def layer_specs(self) -> list[LayerSpec]:
        """What each layer needs from the cache, in layer order."""

    def __call__(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """Logits (B, L, vocab_size) of inputs (B, L), or of input_embeddings (B, L, H) in their place."""


@runtime_checkable
class SplitModel(Protocol):
    """A model whose head is separate, so that a worker applies it to the rows it samples only.

    Our own definitions are split; mlx-lm's are where their parts can be told apart.

    One with a true `packs_rows` computes rows packed into one (workers/cache/packed.py): it knows of positions only by
    `caches[0].offset`, and of other tokens only by `attend`.
    """

    def embed(self, inputs: mx.array) -> mx.array:
        """Token embeddings, (B, L) -> (B, L, H)."""

    def hidden(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """(B, L, H) after the final norm."""

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, L, H) -> (B, L, vocab_size)."""


@runtime_checkable
class MediaModel(Protocol):
    """A split model that takes images, video or audio. `docs/media.md` tells how they reach it.

    Where `media_positions` gives any, `hidden` takes `positions`; where `encode_media` gives more than one layer of
    rows, it takes the others as `deep_embeddings` (D, B, L, H).
    """

    @property
    def modalities(self) -> list[MediaKind]:
        """What it takes beside text."""

    def embed(self, inputs: mx.array) -> mx.array:
        """Token embeddings, (B, L) -> (B, L, H)."""

    def encode_media(self, tensors: Mapping[str, mx.array], grid: Sequence[int], kind: MediaKind) -> mx.array:
        """Rows (1 + D, num_tokens, H) in place of a media item's tokens, from its tensors."""

    @property
    def whole_media(self) -> list[MediaKind]:
        """Kinds whose tokens see later ones of their own item, so that one prefill chunk must hold an item's tokens."""

    @property
    def max_whole_tokens(self) -> int:
        """The most tokens of an item of `whole_media`."""

    def media_positions(self, num_tokens: int, media: Sequence[MediaItem]) -> np.ndarray | None:
        """Where positions are not simply counted: (3, num_tokens) int32 of a prompt's tokens on three axes."""


class CausalMedia:
    """Of a `MediaModel` whose tokens, those of media included, see what stands before them, at positions that count."""

    @property
    def whole_media(self) -> list[MediaKind]:
        return []

    @property
    def max_whole_tokens(self) -> int:
        return 0

    def media_positions(self, num_tokens: int, media: Sequence[MediaItem]) -> np.ndarray | None:
        """Positions are counted."""
        return None
