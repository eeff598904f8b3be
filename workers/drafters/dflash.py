"""DFlash: a whole block of drafts in one pass, its attention reading K/V made from the target's hidden states.

The block is [anchor, mask, mask, ...] at positions P, P+1, ...; each layer attends over the cached context K/V and
over the block's own K/V, which are thrown away. Variants, told apart by the checkpoint: DSpark (a Markov head adds a
previous-token bias from left to right, a second head estimates acceptance) and DFlash 2 (a dynamic convolution along
the block around attention and MLP, and a selector that scores how candidates of neighbouring rows follow each other).

Source: Chen et al. 2026, arXiv:2602.06036; the DFlash 2 parts follow the public checkpoints' layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from workers.cache.kv import KVView
from workers.cache.spec import AttentionSpec
from workers.drafters.base import Drafts, Embed, FeatureDrafter, Head, Sampler, in_order, row_counts
from workers.drafters.block_extras import CandidateSelector, GroupedConv, MarkovHead
from workers.drafters.config import DrafterConfig
from workers.drafters.context import Contexts, ContextState
from workers.drafters.layers import MLP, Attention, Weights, rows_at_own_positions
from workers.drafters.vocabulary import Vocabulary


class Layer:
    def __init__(self, weights: Weights, index: int, config: DrafterConfig) -> None:
        prefix = f"layers.{index}."
        self.attention = Attention(weights, prefix + "self_attn.", config)
        self.mlp = MLP(weights, prefix + "mlp.")
        self.attention_norm = weights.norm(prefix + "input_layernorm")
        self.mlp_norm = weights.norm(prefix + "post_attention_layernorm")
        has_conv = config.conv_num_taps > 0
        self.attention_conv = GroupedConv(weights, prefix + "attention_conv.", config) if has_conv else None
        self.mlp_conv = GroupedConv(weights, prefix + "mlp_conv.", config) if has_conv else None
        self.is_causal = config.causal_layers[index]
        self.window = config.windows[index]

    def __call__(self, x: mx.array, cache: KVView, positions: mx.array) -> mx.array:
        """x (B, T, H): the block's rows; `cache` takes their keys and values behind the context."""
        n = self.attention_norm(x)
        output_kernel = None
        if self.attention_conv is not None:
            n, output_kernel = self.attention_conv.enter(n)
        q, gate = self.attention.queries(n, positions)
        k, v = self.attention.keys_values(n, positions)
        out = cache.attend(q, k, v, self.attention.scale, self.window, sees_spans=not self.is_causal)
        attended = self.attention.output(out, gate)
        if self.attention_conv is not None and output_kernel is not None:
            attended = self.attention_conv.leave(attended, output_kernel)
        x = x + attended
        n = self.mlp_norm(x)
        if self.mlp_conv is None:
            return x + self.mlp(n)
        n, output_kernel = self.mlp_conv.enter(n)
        return x + self.mlp_conv.leave(self.mlp(n), output_kernel)


class DFlashDrafter(FeatureDrafter):
    def __init__(self, weights: Weights, config: DrafterConfig, embed: Embed | None, head: Head | None) -> None:
        self.max_draft_tokens = config.max_draft_tokens
        self.vocabulary = Vocabulary(weights, config, embed, head)
        self.layers = [Layer(weights, i, config) for i in range(config.num_layers)]
        specs = [AttentionSpec(config.num_kv_heads, config.head_dim, config.head_dim) for _ in self.layers]
        self.contexts = Contexts(specs, weights.dtype)
        self.norm = weights.norm("norm")
        self.block_size = config.block_size
        self.mask_token_id = config.mask_token_id
        self.first_row = 0 if config.is_anchor_sampled else 1
        self.markov = MarkovHead(weights, config) if config.markov_rank else None
        self.selector = CandidateSelector(weights, config) if config.selector_rank else None

    @property
    def num_query_heads(self) -> int:
        return self.layers[0].attention.num_heads

    @property
    def draft_widths(self) -> list[int]:
        if not all(layer.is_causal for layer in self.layers):
            return []
        return [w for w in (2, 4, 8, 16) if w <= self.first_row + self.max_draft_tokens]

    def can_draft(self, state: ContextState) -> bool:
        return state.num_rows > 0

    def extend_rows(
        self, states: Sequence[ContextState], features: mx.array, token_ids: Sequence[Sequence[int]]
    ) -> None:
        counts = row_counts(features, token_ids)
        if not sum(counts):
            return
        places = self.contexts.places(states, counts)
        positions = mx.array([s.length + i for s, n in zip(states, counts, strict=True) for i in range(n)])
        for index, layer in enumerate(self.layers):
            self.contexts.write(index, places, *rows_at_own_positions(layer.attention, features, positions))
        self.contexts.advance(states, counts)
        for state, n in zip(states, counts, strict=True):
            state.length += n
        self.contexts.start_writes()

    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        if not all(self.can_draft(s) for s in states):
            raise ValueError("a state without context cannot draft")
        hidden = self._block(states, anchors, num_tokens)
        hidden = self.norm(hidden[:, self.first_row : self.first_row + num_tokens])
        logits = self.vocabulary.logits(hidden)
        if self.selector is None and self.markov is None and sampler is None:
            return Drafts(self.vocabulary.to_target(mx.argmax(logits, axis=-1)))
        previous = mx.array(list(anchors), dtype=mx.int32)
        drafted: list[mx.array] = []
        confidences: list[mx.array] = []
        for step in range(num_tokens):
            scores = logits[:, step]
            if self.selector is not None:
                scores = self.selector(scores, hidden[:, step], previous)
            if self.markov is not None:
                scores = scores + self.markov.bias(previous)
                if self.markov.has_confidence:
                    confidences.append(self.markov.confidence(hidden[:, step], previous))
            previous = self.vocabulary.pick(scores, step, sampler)
            drafted.append(previous)
        return Drafts(mx.stack(drafted, axis=1), mx.stack(confidences, axis=1) if confidences else None)

    def _block(self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int) -> mx.array:
        """The block's rows (B, T, H) before the final norm.

        A bidirectional block always has its trained width; a causal one only the rows that are read.
        """
        is_causal = all(layer.is_causal for layer in self.layers)
        num_block = self.first_row + num_tokens if is_causal else self.block_size
        masks = [self.mask_token_id] * (num_block - 1)
        order = self.contexts.arrange(states, num_block)
        arranged = [states[i] for i in order]
        x = self.vocabulary.embed(mx.array([[anchors[i], *masks] for i in order], dtype=mx.int32))
        positions = mx.array([s.length for s in arranged], dtype=mx.int32)
        caches = self.contexts.views(arranged, num_block, is_causal=is_causal)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cache, positions)
        return in_order(x, order)
