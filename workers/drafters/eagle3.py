"""EAGLE-3: one layer that attends over [embedding ; feature], raw residuals in, its pre-norm output fed back.

Source: Li et al. 2025, arXiv:2503.01840; the layouts of the original and of the Speculators checkpoints.
"""

from __future__ import annotations

import mlx.core as mx

from workers.cache.spec import AttentionSpec
from workers.drafters.base import Embed, Head
from workers.drafters.config import DrafterConfig
from workers.drafters.context import Contexts
from workers.drafters.layers import MLP, Attention, Weights
from workers.drafters.recursive import RecursiveDrafter
from workers.drafters.vocabulary import Vocabulary


class Eagle3Drafter(RecursiveDrafter):
    def __init__(self, weights: Weights, config: DrafterConfig, embed: Embed | None, head: Head | None) -> None:
        self.max_draft_tokens = config.max_draft_tokens
        self.vocabulary = Vocabulary(weights, config, embed, head)
        self.attention = Attention(weights, "layers.0.self_attn.", config)
        spec = AttentionSpec(config.num_kv_heads, config.head_dim, config.head_dim)
        self.contexts = Contexts([spec], weights.dtype)
        self.mlp = MLP(weights, "layers.0.mlp.")
        self.embedding_norm = weights.norm("layers.0.input_layernorm")
        self.feature_norm = weights.norm("layers.0.hidden_norm")
        self.mlp_norm = weights.norm("layers.0.post_attention_layernorm")
        self.norm = weights.norm("norm")
        self.norm_before_residual = config.norm_before_residual
        self.norm_output = config.norm_output

    def combine(self, features: mx.array, embeddings: mx.array) -> tuple[mx.array, mx.array]:
        normed = self.feature_norm(features)
        x = mx.concatenate([self.embedding_norm(embeddings), normed], axis=-1)
        return x, normed if self.norm_before_residual else features

    def finish(self, residual: mx.array, attended: mx.array) -> tuple[mx.array, mx.array]:
        h = residual + attended
        h = h + self.mlp(self.mlp_norm(h))
        normed = self.norm(h)
        return normed, normed if self.norm_output else h
