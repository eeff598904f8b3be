"""Drafts with Gemma 4's assistant: which rows of the target it reads, how they travel, where they are kept.

The target sends for every committed token its final hidden row and the keys and values of its last sliding and last
full block that write any. The drafter keeps those rows and makes none of its own: nothing is written while it drafts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx

from shared.errors import BadModel
from workers.cache.spec import AttentionSpec
from workers.drafters.base import Drafts, Embed, FeatureDrafter, Sampler, arranged, in_order, row_counts
from workers.drafters.config import DrafterConfig
from workers.drafters.context import MAX_BLOCK, Contexts, ContextState
from workers.drafters.gemma4_assistant import AssistantConfig, load_assistant
from workers.models.base import LayerCache
from workers.models.gemma.config import GEMMA4_TYPES, GemmaConfig, LayerShape


def kv_layers(assistant: AssistantConfig, target: Mapping[str, Any]) -> tuple[int, int]:
    """The target's last sliding and last full block that write keys and values.

    Args:
        target: its config.json.
    Raises:
        BadModel: not a Gemma 4, or not the one that this assistant was made for.
    """
    if target.get("model_type") not in GEMMA4_TYPES:
        raise BadModel(f"a Gemma 4 assistant needs a Gemma 4 target, not {target.get('model_type')!r}")
    text = GemmaConfig.from_hf(dict(target), 0)
    if text.hidden_size != assistant.backbone_size or text.vocab_size != assistant.text.vocab_size:
        raise BadModel(
            f"the assistant is for a target of width {assistant.backbone_size} and {assistant.text.vocab_size} tokens; "
            f"this one has {text.hidden_size} and {text.vocab_size}"
        )
    writers = {shape.kind: i for i, shape in enumerate(text.layers) if shape.source is None}
    if len(writers) != 2:
        raise BadModel("a Gemma 4 assistant needs a target with sliding and full layers")
    for shape in assistant.text.layers:
        wanted, found = (shape.num_kv_heads, shape.head_dim), _heads(text.layers[writers[shape.kind]])
        if wanted != found:
            raise BadModel(
                f"the assistant reads {wanted} heads and dims of a {shape.kind} layer, the target has {found}"
            )
    return writers["sliding_attention"], writers["full_attention"]


def describe(folder: Path, config: Mapping[str, Any], target: Mapping[str, Any] | None, limit: int) -> DrafterConfig:
    """Raises:
    BadModel: not an assistant that is supported, or no target that it fits.
    """
    assistant = AssistantConfig.from_hf(config)
    if target is None:
        raise BadModel(f"{folder}: a Gemma 4 assistant needs its target's configuration")
    layers = kv_layers(assistant, target)
    text = GemmaConfig.from_hf(dict(target), 0)
    return DrafterConfig(
        kind="assistant",
        path=folder,
        max_draft_tokens=limit,
        feature="hidden_and_kv",
        kv_layers=layers,
        kv_shapes=tuple(_heads(text.layers[i]) for i in layers),
        hidden_size=assistant.backbone_size,
        num_layers=len(assistant.text.layers),
        vocab_size=assistant.text.vocab_size,
        draft_vocab_size=assistant.text.vocab_size,
        has_own_head=True,
        embedding_scale=float(assistant.backbone_size**0.5),
    )


def _heads(shape: LayerShape) -> tuple[int, int]:
    return shape.num_kv_heads, shape.head_dim


class AssistantDrafter(FeatureDrafter):
    """Keeps the target's rows of committed tokens and drafts from them.

    A feature row is [hidden | keys, values of the sliding layer | keys, values of the full layer], heads joined; keys
    are rotated. Nothing is written while it drafts.

    Args:
        embed: the target's embedding rows, unscaled.
    Raises:
        BadModel: a tensor is missing or misshapen, or there is no embedding.
    """

    def __init__(self, config: DrafterConfig, dtype: mx.Dtype, embed: Embed | None) -> None:
        if embed is None:
            raise BadModel(f"assistant {config.path} needs the target's embedding")
        self.max_draft_tokens = config.max_draft_tokens
        self.model = load_assistant(config.path, dtype)
        self._embed, self._scale = embed, config.embedding_scale
        self._hidden_size = config.hidden_size
        self._shapes = config.kv_shapes
        windows = (self.model.config.text.window, None)
        self.contexts = Contexts(
            [AttentionSpec(heads, dim, dim, w) for (heads, dim), w in zip(self._shapes, windows, strict=True)], dtype
        )

    @property
    def num_query_heads(self) -> int:
        return self.model.config.text.num_heads

    @property
    def draft_widths(self) -> list[int]:
        """No kernel serves here: these layers write nothing, and reading alone was not tried for drafts yet."""
        return []

    def can_draft(self, state: ContextState) -> bool:
        return state.has_pending

    def extend_rows(
        self, states: Sequence[ContextState], features: mx.array, token_ids: Sequence[Sequence[int]]
    ) -> None:
        new = [(state, n) for state, n in zip(states, row_counts(features, token_ids), strict=True) if n]
        if not new:
            return
        owners, lengths = [state for state, _ in new], [n for _, n in new]
        at = self._hidden_size
        for layer, (heads, dim) in enumerate(self._shapes):
            width = heads * dim
            keys, values = features[:, at : at + width], features[:, at + width : at + 2 * width]
            at += 2 * width
            shape = (features.shape[0], heads, dim)
            places = self.contexts.places(owners, lengths, layer)
            self.contexts.write(layer, places, keys.reshape(shape), values.reshape(shape))
        self.contexts.advance(owners, lengths)
        last = mx.array([end - 1 for end in accumulate(lengths)])
        self.contexts.keep_pending(owners, features[last, : self._hidden_size])
        for state, n in new:
            state.length += n
        self.contexts.start_writes()

    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        if not all(self.can_draft(s) for s in states):
            raise ValueError("a state without its last hidden row cannot draft")
        order = self.contexts.arrange(states, 0)
        owners = [states[i] for i in order]
        sliding, full = self.contexts.views(owners, 1, step=-1)
        caches: dict[str, LayerCache] = {"sliding_attention": sliding, "full_attention": full}
        positions = mx.array([s.length for s in owners], dtype=mx.int32)
        hidden = self.contexts.pending(owners)
        tokens = mx.array([anchors[i] for i in order], dtype=mx.int32)
        drafted = []
        for step in range(num_tokens):
            logits, hidden = self.model(self._embed(tokens) * self._scale, hidden, caches, positions)
            logits = in_order(logits.astype(mx.float32), order)
            drafted.append((mx.argmax(logits, axis=-1) if sampler is None else sampler(logits, step)).astype(mx.int32))
            tokens = arranged(drafted[-1], order)
        return Drafts(mx.stack(drafted, axis=1))

    def truncate(self, state: ContextState, length: int) -> int:
        """The last hidden row is gone with what is cut, so that nothing is drafted before the next row comes."""
        if length < state.length:
            state.has_pending = False
            super().truncate(state, length)
            if state.num_written - state.num_rows > MAX_BLOCK:  # the ring lost rows of the window
                state.start, state.num_rows, state.num_written = length, 0, 0
        return state.length
