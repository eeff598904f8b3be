"""From a drafter's hidden rows to token ids of the target: embedding, head, reduced vocabulary, softcap."""

from __future__ import annotations

import mlx.core as mx

from shared.errors import BadModel
from workers.drafters.base import Embed, Head, Sampler
from workers.drafters.config import DrafterConfig
from workers.drafters.layers import Weights


class Vocabulary:
    """Embeds target ids and picks target ids from hidden rows.

    A reduced head scores `draft_vocab_size` tokens; `d2t` holds offsets: target id = draft id + d2t[draft id].
    """

    def __init__(self, weights: Weights, config: DrafterConfig, embed: Embed | None, head: Head | None) -> None:
        """Raises BadModel: the checkpoint has no embedding or head of its own and none is given."""
        if config.has_own_embedding:
            table = weights.array("embed_tokens.weight")
            embed = table.__getitem__
        if config.has_own_head:
            head = weights.linear("lm_head")
        if embed is None or head is None:
            raise BadModel(f"{config.kind} drafter {config.path} needs the target's embedding and head")
        self._embed: Embed = embed
        self._head: Head = head
        self._embedding_scale = config.embedding_scale
        self._multiplier = config.logit_multiplier
        self._softcap = config.logit_softcap
        self._vocab_size = config.vocab_size
        self._target_ids: mx.array | None = None
        if weights.has("d2t"):
            offsets = weights.array("d2t").astype(mx.int32)
            self._target_ids = mx.arange(offsets.size, dtype=mx.int32) + offsets

    def embed(self, token_ids: mx.array) -> mx.array:
        rows = self._embed(token_ids)
        return rows if self._embedding_scale == 1.0 else rows * self._embedding_scale

    def logits(self, hidden: mx.array) -> mx.array:
        """Float32 logits (..., draft vocabulary)."""
        logits = self._head(hidden).astype(mx.float32)
        if self._multiplier != 1.0:
            logits = logits * self._multiplier
        return logits if self._softcap is None else mx.tanh(logits / self._softcap) * self._softcap

    def to_target(self, draft_ids: mx.array) -> mx.array:
        draft_ids = draft_ids.astype(mx.int32)
        return draft_ids if self._target_ids is None else self._target_ids[draft_ids]

    def widen(self, logits: mx.array) -> mx.array:
        """(B, draft vocabulary) -> (B, V) with minus infinity for tokens that the head cannot score."""
        if self._target_ids is None:
            return logits
        full = mx.full((*logits.shape[:-1], self._vocab_size), -mx.inf, dtype=logits.dtype)
        full[..., self._target_ids] = logits
        return full

    def pick(self, logits: mx.array, step: int, sampler: Sampler | None) -> mx.array:
        """Target ids (B,) from logits (B, draft vocabulary): the sampler's, or the most likely ones."""
        if sampler is None:
            return self.to_target(mx.argmax(logits, axis=-1))
        return sampler(self.widen(logits), step).astype(mx.int32)
