"""A whole causal language model as the drafter of a larger one with the same tokenizer.

Its state is the committed tokens and one cache per layer. The cache may hold more rows than were committed: those of
its own last draft. The next call keeps the ones that were accepted and trims the rest, so rolling back costs nothing
and a fully accepted draft only needs its last token and the new anchor ingested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from shared.errors import BadModel
from workers.drafters.base import Drafter, Drafts, Sampler
from workers.drafters.checkpoint import MAX_MODEL_TOKENS
from workers.drafters.context import ContextState

PREFILL_CHUNK = 512

Model = Callable[..., mx.array]
"""(inputs (1, T), cache=[...]) -> logits (1, T, V), mlx-lm's convention."""


class TokenState(ContextState):
    """Committed tokens and the model's cache, whose rows are those of `cached`."""

    def __init__(self, cache: list[Any]) -> None:
        super().__init__()
        self.tokens: list[int] = []
        self.cached: list[int] = []
        self.unread: mx.array | None = None  # (n,) drafted tokens whose rows follow those of `cached`
        self.cache = cache

    def arrays(self) -> list[mx.array]:
        return [array for layer in self.cache for array in (layer.keys, layer.values) if array is not None]


class CausalLMDrafter(Drafter):
    """Drafts sequence by sequence: each has a cache object of its own."""

    def __init__(self, model: Model, target_vocab_size: int, make_cache: Callable[[], list[Any]] | None = None) -> None:
        """
        Args:
            make_cache: empty caches, one per layer; None for mlx-lm's own.
        Raises:
            BadModel: the cache cannot be trimmed (recurrent layers), so a draft could not be rolled back.
        """
        self.max_draft_tokens = MAX_MODEL_TOKENS
        self._model = model
        self._vocab_size = target_vocab_size
        self._make_cache = make_cache or (lambda: make_prompt_cache(model))
        if not can_trim_prompt_cache(self._make_cache()):
            raise BadModel("a draft model needs a cache that can be rolled back; recurrent layers cannot")

    def new_state(self, start: int = 0) -> ContextState:
        """`start` is always 0 here: the caller has every token."""
        if start != 0:
            raise ValueError("a draft model starts from the first token")
        return TokenState(self._make_cache())

    def can_draft(self, state: ContextState) -> bool:
        return True

    def extend_rows(
        self, states: Sequence[ContextState], features: mx.array, token_ids: Sequence[Sequence[int]]
    ) -> None:
        """Note committed tokens and run all whole chunks of them; the rest waits for the next draft."""
        for state, ids in zip(states, token_ids, strict=True):
            assert isinstance(state, TokenState), "a state of another drafter"
            state.tokens.extend(ids)
            state.length += len(ids)
            if len(state.tokens) - len(state.cached) >= PREFILL_CHUNK:
                self._keep_common(state, state.tokens)
            while len(state.tokens) - len(state.cached) >= PREFILL_CHUNK:
                self._run(state, state.tokens[len(state.cached) :][:PREFILL_CHUNK])
                mx.eval(state.arrays())  # bounds the memory of a long prefill

    def draft(
        self, states: Sequence[ContextState], anchors: Sequence[int], num_tokens: int, sampler: Sampler | None = None
    ) -> Drafts:
        last = []
        for state, anchor in zip(states, anchors, strict=True):
            assert isinstance(state, TokenState), "a state of another drafter"
            ids = [*state.tokens, anchor]
            self._keep_common(state, ids)
            missing = ids[len(state.cached) :]
            last.append(self._run(state, missing))
        drafted: list[mx.array] = []
        for step in range(num_tokens):
            logits = self._fitted(mx.concatenate(last).astype(mx.float32))
            picked = mx.argmax(logits, axis=-1) if sampler is None else sampler(logits, step)
            drafted.append(picked.astype(mx.int32))
            if step + 1 < num_tokens:
                last = [self._feed(state, drafted[-1][b : b + 1]) for b, state in enumerate(states)]
        token_ids = mx.stack(drafted, axis=1)
        for b, state in enumerate(states):
            assert isinstance(state, TokenState), "a state of another drafter"
            state.unread = token_ids[b, :-1]  # the last one was never run
        return Drafts(token_ids)

    def truncate(self, state: ContextState, length: int) -> int:
        assert isinstance(state, TokenState), "a state of another drafter"
        del state.tokens[length:]
        state.length = len(state.tokens)
        return state.length

    def _run(self, state: TokenState, token_ids: list[int]) -> mx.array:
        """Logits (1, V) after the last of these tokens."""
        logits = self._model(mx.array([token_ids]), cache=state.cache)
        state.cached.extend(token_ids)
        return logits[:, -1]

    def _feed(self, state: ContextState, token: mx.array) -> mx.array:
        """Logits (1, V) after a drafted token that is still on the device."""
        assert isinstance(state, TokenState), "a state of another drafter"
        return self._model(token[None], cache=state.cache)[:, -1]

    def _keep_common(self, state: TokenState, ids: Sequence[int]) -> None:
        """Trim the cache to the rows that `ids` begins with, leaving at least one token of `ids` to run."""
        if state.unread is not None:
            state.cached.extend(
                cast(list[int], state.unread.tolist())
            )  # the caller has read this draft: no new synchronisation
            state.unread = None
        common, limit = 0, min(len(state.cached), len(ids) - 1)
        if state.cached[:limit] == ids[:limit]:
            common = limit
        else:
            while state.cached[common] == ids[common]:
                common += 1
        surplus = len(state.cached) - common
        if surplus > 0:
            if trim_prompt_cache(state.cache, surplus) != surplus:  # a full sliding window cannot go back
                state.cache, common = self._make_cache(), 0
            del state.cached[common:]

    def _fitted(self, logits: mx.array) -> mx.array:
        """Logits over the target's vocabulary: padded heads differ in width between sizes of one family."""
        width = logits.shape[-1]
        if width >= self._vocab_size:
            return logits[:, : self._vocab_size]
        return mx.pad(logits, [(0, 0), (0, self._vocab_size - width)], constant_values=-mx.inf)
