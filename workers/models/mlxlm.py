"""The other text architectures of mlx-lm, on our caches.

mlx-lm's models take a list of caches and know them by a small protocol (`update_and_fetch`, `make_mask`, `offset`;
indexed arrays for recurrent layers), which the views of workers/cache speak too. So a model runs as it is; what is left
to find out is what each layer keeps.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_cache

from shared.errors import BadModel
from workers.cache.spec import AttentionSpec, LayerSpec, LeafSpec, ListSpec, RecurrentSpec
from workers.cache.store import CacheStore
from workers.machine import is_cpu
from workers.models import gated_delta
from workers.models.lfm2_vl import attention as lfm2_attention
from workers.models.qwen import hybrid

logger = logging.getLogger("target")

PROBE_TOKENS = 2  # wider than one token, which some models treat apart

# They add the mask to scores (B, num_kv_heads, heads per kv head, L, n): a mask with one row per sequence,
# (B, 1, L, n), has to be (B, 1, 1, L, n) for them.
GROUPED_SCORES = frozenset({"gemma2"})

# Whose output for rows of different lengths would be wrong without an error.
REFUSED = {
    "afm7": "its layers that reuse keys take positions from the number of keys, one for all rows of a batch",
    "phi3small": "its block-sparse attention assumes that all rows of a batch have one length",
}

# Of both, decoder, embedding and head are known to be all there is: no scale or cap lies between them.
HYBRIDS = frozenset({"qwen3_5", "qwen3_5_moe", "qwen3_next"})
SHORT_CONVOLUTIONS = frozenset({"lfm2"})


class MlxLmModel:
    """A `TextModel` around a model of mlx-lm."""

    def __init__(self, model: nn.Module, architecture: str) -> None:
        """Raises:
        BadModel: a layer keeps something that our caches do not hold.
        """
        if architecture in REFUSED:
            raise BadModel(f"{architecture}: {REFUSED[architecture]}; that is not supported")
        self.model = model
        self._has_grouped_scores = architecture in GROUPED_SCORES
        self._specs, self.vocab_size = probe(model, architecture)
        self._try_ragged_batch(architecture)

    def layer_specs(self) -> list[LayerSpec]:
        return self._specs

    def __call__(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        if cache is not None and self._has_grouped_scores:
            cache = [GroupedMask(view) for view in cache]
        extra = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        logits: mx.array = self.model(inputs, cache=cache, **extra)
        return logits

    def _try_ragged_batch(self, architecture: str) -> None:
        """Build, without evaluating it, a decode step of two rows of different lengths.

        Raises:
            BadModel: the model takes positions or masks for one length only.
        """
        store = CacheStore(self._specs, [64], PROBE_TOKENS, mx.float32, is_exact=True)
        for slot, length in enumerate((1, 2)):
            store.ensure(slot, 64)
            batch = store.open([slot], [0], length)
            self._build(architecture, mx.zeros((1, length), dtype=mx.int32), batch.layers)
            batch.close()
        self._build(architecture, mx.zeros((2, 1), dtype=mx.int32), store.open([0, 1], [1, 2], 1).layers)

    def _build(self, architecture: str, inputs: mx.array, cache: Sequence[object]) -> None:
        try:
            self(inputs, cache)
        except Exception as error:  # any fault of a model that we did not write
            raise BadModel(f"{architecture}: cannot run rows of different lengths together: {error}") from error


class SplitMlxLmModel(MlxLmModel):
    """Also a `SplitModel`, so that drafters and embeddings see its final rows and share its embedding and head."""

    def embed(self, inputs: mx.array) -> mx.array:
        rows: mx.array = self.model.model.embed_tokens(inputs)
        return rows

    def hidden(
        self, inputs: mx.array, cache: Sequence[object] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        extra = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        rows: mx.array = self.model.model(inputs, cache=cache, **extra)
        return rows

    def logits(self, hidden: mx.array) -> mx.array:
        language_model = getattr(self.model, "language_model", self.model)
        has_head = "lm_head" in language_model
        head = language_model.lm_head if has_head else language_model.model.embed_tokens.as_linear
        logits: mx.array = head(hidden)
        return logits


class HybridMlxLmModel(SplitMlxLmModel):
    """One of `HYBRIDS`. Its layers run by workers/models/qwen/hybrid.py."""

    rewinds = True  # its recurrent layers leave trails

    def __init__(self, model: nn.Module, architecture: str) -> None:
        _install_gated_delta()
        super().__init__(model, architecture)
        hybrid.install(model)
        if not is_cpu():
            hybrid.join(model)

    def query_heads(self) -> list[int]:
        return hybrid.query_heads(self.model)


class ShortConvolutionModel(SplitMlxLmModel):
    """LFM2: attention and short convolutions. Attention runs by workers/models/lfm2_vl/attention.py."""

    def __init__(self, model: nn.Module, architecture: str) -> None:
        super().__init__(model, architecture)
        lfm2_attention.install(model)

    def query_heads(self) -> list[int]:
        return lfm2_attention.query_heads(self.model)


def adapted(model: nn.Module, architecture: str) -> MlxLmModel:
    """Raises:
    BadModel: as `MlxLmModel`.
    """
    if architecture in HYBRIDS:
        return HybridMlxLmModel(model, architecture)
    if hasattr(sys.modules[type(model).__module__], "gated_delta_update"):
        _install_gated_delta()
    return (ShortConvolutionModel if architecture in SHORT_CONVOLUTIONS else MlxLmModel)(model, architecture)


def _install_gated_delta() -> None:
    logger.info("gated delta rule: %s", gated_delta.install(is_cpu=is_cpu()))


class GroupedMask:
    """A cache view whose mask arrays have an axis more, for the heads that share a key-value head."""

    def __init__(self, view: Any) -> None:  # noqa: ANN401 - any view of workers/cache
        self._view = view

    def make_mask(self, n: int, **options: Any) -> Any:  # noqa: ANN401 - mlx-lm's protocol: an array, a name or None
        mask = self._view.make_mask(n, **options)
        return mask[:, :, None] if isinstance(mask, mx.array) else mask

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - everything else is the view's
        return getattr(self._view, name)


def probe(model: nn.Module, architecture: str) -> tuple[list[LayerSpec], int]:
    """What each layer keeps, and the size of the vocabulary, from the shapes of a forward that is never evaluated.

    Configurations name head counts and sizes in many ways; the arrays that arrive in the model's own caches tell them
    without guessing.

    Raises:
        BadModel: naming the architecture and the kind of cache that is not supported.
    """
    caches = mlx_cache.make_prompt_cache(model)
    try:
        logits = model(mx.zeros((1, PROBE_TOKENS), dtype=mx.int32), cache=caches)
    except Exception as error:  # any fault of a model that we did not write
        raise BadModel(f"{architecture}: the model does not run: {error}") from error
    return [_spec(cache, architecture) for cache in caches], int(logits.shape[-1])


def _spec(cache: Any, architecture: str) -> LayerSpec:  # noqa: ANN401 - mlx-lm's caches have no common public type
    if type(cache) is mlx_cache.CacheList:
        children = [_spec(child, architecture) for child in cache.caches]
        leaves: list[LeafSpec] = [c for c in children if not isinstance(c, ListSpec)]
        if len(leaves) != len(children):
            raise BadModel(f"{architecture}: nested lists of caches are not supported")
        return ListSpec(tuple(leaves))
    if type(cache) is mlx_cache.ArraysCache:
        return RecurrentSpec(len(cache.cache))
    if type(cache) is mlx_cache.KVCache or (type(cache) is mlx_cache.RotatingKVCache and cache.keep == 0):
        if cache.keys is None:
            raise BadModel(f"{architecture}: a layer's {type(cache).__name__} stays empty; that is not supported")
        window = cache.max_size if type(cache) is mlx_cache.RotatingKVCache else None
        return AttentionSpec(cache.keys.shape[1], cache.keys.shape[3], cache.values.shape[3], window)
    kept = f" with keep={cache.keep}" if getattr(cache, "keep", 0) else ""
    raise BadModel(f"{architecture}: cache type {type(cache).__name__}{kept} is not supported")
