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

from workers.drafters.base import (
    ContextState,
    Drafter,
    Drafts,
    Embed,
    Head,
    Sampler,
    bucket,
    stack_context,
    start_writes,
)
from workers.drafters.block_extras import CandidateSelector, GroupedConv, MarkovHead
from workers.drafters.config import DrafterConfig
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

    def __call__(
        self, x: mx.array, context: tuple[mx.array, mx.array], positions: mx.array, mask: mx.array
    ) -> mx.array:
        n = self.attention_norm(x)
        output_kernel = None
        if self.attention_conv is not None:
            n, output_kernel = self.attention_conv.enter(n)
        q, gate = self.attention.queries(n, positions)
        k, v = self.attention.keys_values(n, positions)
        k = mx.concatenate([context[0], k], axis=2)
        v = mx.concatenate([context[1], v], axis=2)
        attended = self.attention.attend(q, k, v, mask, gate)
        if self.attention_conv is not None and output_kernel is not None:
            attended = self.attention_conv.leave(attended, output_kernel)
        x = x + attended
        n = self.mlp_norm(x)
        if self.mlp_conv is None:
            return x + self.mlp(n)
        n, output_kernel = self.mlp_conv.enter(n)
        return x + self.mlp_conv.leave(self.mlp(n), output_kernel)


class DFlashDrafter(Drafter):
    def __init__(self, weights: Weights, config: DrafterConfig, embed: Embed | None, head: Head | None) -> None:
        self.max_draft_tokens = config.max_draft_tokens
        self.vocabulary = Vocabulary(weights, config, embed, head)
        self.layers = [Layer(weights, i, config) for i in range(config.num_layers)]
        self.norm = weights.norm("norm")
        self.block_size = config.block_size
        self.mask_token_id = config.mask_token_id
        self.first_row = 0 if config.is_anchor_sampled else 1
        self.markov = MarkovHead(weights, config) if config.markov_rank else None
        self.selector = CandidateSelector(weights, config) if config.selector_rank else None

    def new_state(self, start: int = 0) -> ContextState:
        return ContextState(len(self.layers), start)

    def can_draft(self, state: ContextState) -> bool:
        return state.num_rows > 0

    def extend(
        self, states: Sequence[ContextState], features: Sequence[mx.array], token_ids: Sequence[Sequence[int]]
    ) -> None:
        counts = [rows.shape[0] for rows in features]
        if not sum(counts):
            return
        positions = mx.array([s.length + i for s, n in zip(states, counts, strict=True) for i in range(n)])
        rows = mx.concatenate(list(features))
        for index, layer in enumerate(self.layers):
            keys, values = rows_at_own_positions(layer.attention, rows, positions)
            at = 0
            for state, n in zip(states, counts, strict=True):
                if n:
                    state.append(index, keys[:, at : at + n], values[:, at : at + n])
                at += n
        for state, n in zip(states, counts, strict=True):
            state.advance(n)
            state.length += n
        start_writes(states)

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
        x = self.vocabulary.embed(mx.array([[anchor, *masks] for anchor in anchors], dtype=mx.int32))
        positions = mx.array([s.length for s in states], dtype=mx.int32)
        num_rows = bucket(max(s.num_rows for s in states))
        visible = {
            (layer.is_causal, layer.window): _mask(states, num_rows, num_block, layer.is_causal, layer.window)
            for layer in self.layers
        }
        for index, layer in enumerate(self.layers):
            context = stack_context(states, index, num_rows)
            x = layer(x, context, positions, visible[layer.is_causal, layer.window])
        return x


def _mask(
    states: Sequence[ContextState], num_rows: int, num_block: int, is_causal: bool, window: int | None
) -> mx.array:
    """(B, 1, num_block, num_rows + num_block), True where a row may look.

    Columns: context rows (position start + column), then the block. With a window, row at position p sees context
    positions > p - window, so the anchor sees window-1 of them.
    """
    column = mx.arange(num_rows)[None]
    is_context = column < mx.array([s.num_rows for s in states])[:, None]
    context = mx.broadcast_to(is_context[:, None], (len(states), num_block, num_rows))
    if window is not None:
        at = column + mx.array([s.start for s in states])[:, None]
        row = mx.array([s.length for s in states])[:, None] + mx.arange(num_block)[None]
        context = context & (row[:, :, None] - at[:, None] < window)
    j = mx.arange(num_block)
    own = j[None] <= j[:, None] if is_causal else mx.ones((num_block, num_block), dtype=mx.bool_)
    if window is not None:
        own = own & (j[:, None] - j[None] < window)
    own = mx.broadcast_to(own[None], (len(states), num_block, num_block))
    return mx.concatenate([context, own], axis=2)[:, None]
