"""A multi-token-prediction head: fc([norm(embedding) ; norm(hidden)]), one block, norm, the target's head.

The hidden rows are the target's *after* its final norm, and the recursion is fed the head's own post-norm row. Plain
RMSNorm and the Qwen3.5 form (zero-centred norms, output gate, q/k norms, partial rope) differ only in the checkpoint;
an MLP and experts too.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from shared.messages import MediaItem
from workers.cache.spec import AttentionSpec
from workers.drafters.base import Embed, Head
from workers.drafters.config import DrafterConfig
from workers.drafters.context import Contexts
from workers.drafters.layers import MLP, Attention, Weights, sparse_mlp
from workers.drafters.places import TokenPlaces
from workers.drafters.recursive import RecursiveDrafter
from workers.drafters.vocabulary import Vocabulary


class MTPDrafter(RecursiveDrafter):
    def __init__(self, weights: Weights, config: DrafterConfig, embed: Embed | None, head: Head | None) -> None:
        self.max_draft_tokens = config.max_draft_tokens
        self.vocabulary = Vocabulary(weights, config, embed, head)
        self.attention = Attention(weights, "layers.0.self_attn.", config)
        spec = AttentionSpec(config.num_kv_heads, config.head_dim, config.head_dim)
        self.contexts = Contexts([spec], weights.dtype)
        prefix = "layers.0.mlp."
        self.mlp = sparse_mlp(weights, prefix, config) if config.num_chosen_experts else MLP(weights, prefix)
        self.fc = weights.linear("fc")
        self.embedding_norm = weights.norm("pre_fc_norm_embedding")
        self.hidden_norm = weights.norm("pre_fc_norm_hidden")
        self.attention_norm = weights.norm("layers.0.input_layernorm")
        self.mlp_norm = weights.norm("layers.0.post_attention_layernorm")
        self.norm = weights.norm("norm")

    def places(self, media: Sequence[MediaItem]) -> TokenPlaces | None:
        return TokenPlaces(media) if self.attention.has_axes else None

    def combine(self, features: mx.array, embeddings: mx.array) -> tuple[mx.array, mx.array]:
        pair = mx.concatenate([self.embedding_norm(embeddings), self.hidden_norm(features)], axis=-1)
        residual = self.fc(pair)
        return self.attention_norm(residual), residual

    def finish(self, residual: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        h = residual + attended
        h = h + self.mlp(self.mlp_norm(h))
        normed = self.norm(h)
        return normed, normed
