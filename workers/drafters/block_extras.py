"""Trained parts that some block drafters add to DFlash: DSpark's heads, DFlash 2's convolution and selector."""

from __future__ import annotations

import mlx.core as mx

from shared.errors import BadModel
from workers.drafters.config import DrafterConfig
from workers.drafters.layers import Linear, Weights


class MarkovHead:
    """DSpark: a low-rank bias on the next token's logits from the previous token, and the acceptance estimate.

    W1 is indexed by target ids (the previous token was picked already); W2 scores the draft vocabulary.
    """

    def __init__(self, weights: Weights, config: DrafterConfig) -> None:
        self.w1 = weights.array("markov_head.markov_w1.weight")
        self.w2 = weights.linear("markov_head.markov_w2")
        self.has_confidence = config.has_confidence
        self.is_confidence_fed_markov = config.is_confidence_fed_markov
        self._confidence: Linear | None = weights.linear("confidence_head.proj") if config.has_confidence else None

    def bias(self, previous: mx.array) -> mx.array:
        """(B,) target ids -> (B, draft vocabulary)."""
        return self.w2(self.w1[previous]).astype(mx.float32)

    def confidence(self, hidden: mx.array, previous: mx.array) -> mx.array:
        """(B, H) rows after the final norm and (B,) previous tokens -> (B,) in 0..1."""
        assert self._confidence is not None, "the checkpoint has no confidence head"
        row = mx.concatenate([hidden, self.w1[previous]], axis=-1) if self.is_confidence_fed_markov else hidden
        return mx.sigmoid(self._confidence(row)[:, 0].astype(mx.float32))


class GroupedConv:
    """DFlash 2: y_i = sum_t (base_t + delta_i,t) x_{i-t} along the block; `delta` is shared by a group of channels.

    One projection of the sublayer's input gives the corrections of both sides, the input's and the output's. Rows
    before the block count as zero, so the anchor's row has only its own tap.
    """

    def __init__(self, weights: Weights, prefix: str, config: DrafterConfig) -> None:
        self.num_taps = config.conv_num_taps
        self.group_size = config.conv_group_size
        self.num_groups = config.hidden_size // self.group_size
        self.base = weights.array(prefix + "base_kernel")  # (2 sides, taps, H)
        self.project = weights.linear(prefix + "kernel_projection")
        if self.base.shape != (2, self.num_taps, config.hidden_size):
            raise BadModel(f"{config.path}: {prefix}base_kernel has shape {self.base.shape}")

    def enter(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """(convolved input (B, T, H), corrections for `leave`)."""
        delta = self.project(x).reshape(*x.shape[:2], 2, self.num_taps, self.num_groups)
        return self._convolve(x, delta[:, :, 0], 0), delta[:, :, 1]

    def leave(self, y: mx.array, delta: mx.array) -> mx.array:
        return self._convolve(y, delta, 1)

    def _convolve(self, x: mx.array, delta: mx.array, side: int) -> mx.array:
        b, t, h = x.shape
        kernel = mx.repeat(delta, self.group_size, axis=-1) + self.base[side]  # (B, T, taps, H)
        total = kernel[:, :, 0] * x
        for tap in range(1, min(self.num_taps, t)):
            shifted = mx.concatenate([mx.zeros((b, tap, h), dtype=x.dtype), x[:, :-tap]], axis=1)
            total = total + kernel[:, :, tap] * shifted
        return total


class CandidateSelector:
    """DFlash 2: rescores each row's most likely tokens by how they follow the token picked before.

    score(c) = logit(c) + <A[previous] * P h, B[c]>; every other token is out of the running.
    """

    def __init__(self, weights: Weights, config: DrafterConfig) -> None:
        self.predecessors = weights.array("candidate_selector.predecessor_codebook")  # (V, rank)
        self.successors = weights.array("candidate_selector.successor_codebook")  # (V, rank)
        self.project = weights.linear("candidate_selector.hidden_projection")
        self.top_k = config.selector_top_k
        self.vocab_size = config.vocab_size

    def __call__(self, logits: mx.array, hidden: mx.array, previous: mx.array) -> mx.array:
        """Logits (B, V), rows after the final norm (B, H), ids (B,) -> scores (B, V), -inf for all but top_k."""
        logits = logits[:, : self.vocab_size]  # a padded head must not reach behind the codebooks
        candidates = mx.argpartition(logits, kth=-self.top_k, axis=-1)[:, -self.top_k :]
        query = self.predecessors[previous] * self.project(hidden)
        transition = (self.successors[candidates] @ query[:, :, None])[:, :, 0].astype(mx.float32)
        scores = mx.take_along_axis(logits, candidates, axis=-1) + transition
        return mx.put_along_axis(mx.full(logits.shape, -mx.inf), candidates, scores, axis=-1)
