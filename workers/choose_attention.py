"""Which attention and which cache layout serve a model here: kernels that prove themselves, in blocks if all can.

Blocks that prefixes share (docs/paged-cache.md) are taken where a kernel attends to them in every layer: stock
operations would gather them. Not for sliding windows, whose rings are copied when they are written, and not beside
recurrent states, which the scheduler counts as if nothing were shared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from shared.config import Settings
from workers.cache.spec import AttentionSpec, leaves
from workers.cache.store import CacheStore
from workers.kernels.choice import AttentionChoice, Form
from workers.kernels.select import select
from workers.load import LoadedModel
from workers.machine import DTYPES
from workers.viewed_weights import view_weights

logger = logging.getLogger("target")

Layers = Sequence[tuple[AttentionSpec, int]]


@dataclass(frozen=True)
class Chosen:
    """Args:
    layout: of the keys and values, one of `layouts.LAYOUTS`.
    attention: the kernels that serve; None: stock operations do everything.
    """

    layout: str
    attention: AttentionChoice | None


def choose(loaded: LoadedModel, settings: Settings) -> Chosen:
    """Try what may serve, the best first.

    Raises:
        BadConfig: a kernel was asked for that this machine or model cannot have.
    """
    if settings.kv_layout == "auto" and not _may_share_blocks(loaded):
        return Chosen("slots", _kernels(loaded, settings, is_paged=False))
    if settings.kv_layout != "slots":
        found = _kernels(loaded, settings, is_paged=True)
        if settings.kv_layout == "paged" or (found is not None and all(found.is_used.values())):
            logger.info("keys and values: in blocks that prefixes share")
            return Chosen("paged", found)
        logger.info("keys and values: in slots, since not every layer's kernel serves in blocks")
    return Chosen("slots", _kernels(loaded, settings, is_paged=False))


def install(choice: AttentionChoice | None, loaded: LoadedModel, store: CacheStore) -> None:
    """Give the caches their kernels and the model the forms of its weights that go with them."""
    store.use_attention(choice)
    if choice is not None and choice.is_used and all(choice.is_used.values()):
        join = getattr(loaded.model, "join_attention_inputs", None)
        if join is not None:
            join()
    view_weights(loaded.model)


def _may_share_blocks(loaded: LoadedModel) -> bool:
    """A model whose layers all end in `cache.attend` with all they have seen, on a machine with CUDA."""
    specs = leaves(loaded.model.layer_specs())
    is_full = all(isinstance(spec, AttentionSpec) and spec.window is None for spec in specs)
    return is_full and hasattr(loaded.model, "query_heads") and mx.cuda.is_available()


def _kernels(loaded: LoadedModel, settings: Settings, *, is_paged: bool) -> AttentionChoice | None:
    specs = [s for s in leaves(loaded.model.layer_specs()) if isinstance(s, AttentionSpec)]
    query_heads = getattr(loaded.model, "query_heads", None)  # models whose layers end in `cache.attend` tell
    layers: Layers = list(zip(specs, query_heads(), strict=True)) if query_heads is not None else []
    shared_layers = getattr(loaded.model, "shared_layers", None)
    form: Form = getattr(loaded.model, "attention_form", "apart")
    return select(
        layers,
        DTYPES[loaded.dtype],
        settings.attention,
        is_speculative=bool(settings.draft_checkpoint or settings.is_ngram),
        cache_folder=settings.cache_folder,
        is_paged=is_paged,
        shared=[layers[i] for i in shared_layers()] if layers and shared_layers is not None else (),
        form=form,
    )
