"""From logits to tokens, for any mix of requests in one call.

Order of operations: logit bias, penalties, grammar mask, temperature, top-k, top-p, min-p; then one draw by inverse
transform.
`probabilities` is the only place that builds a row's distribution: plain decode, verification and rejection sampling
all use it, so the distribution that is tested is the one that is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from shared.messages import SamplingParams, TokenLogprob, TopLogprob
from workers import cpu_math
from workers.arrays import to_list
from workers.machine import is_cpu
from workers.sampling.constraint import Constraint, Mask
from workers.sampling.rejection import Proposal, tried
from workers.sampling.uniform import ACCEPT, DRAW, RESIDUAL, uniform

MAX_TOP_LOGPROBS = 20


@dataclass
class SlotSampling:
    """One sequence's sampling state. Count arrays exist only where a penalty needs them."""

    params: SamplingParams
    vocab_size: int
    prompt_mask: mx.array | None = None  # (V,) bool: ids of the prompt
    output_counts: mx.array | None = None  # (V,) float32: how often each id was put out
    constraint: Constraint | None = None
    error: str | None = None  # the sequence cannot be sampled: it fails alone

    @staticmethod
    def start(
        params: SamplingParams, vocab_size: int, token_ids: Sequence[int], num_prompt_tokens: int
    ) -> SlotSampling:
        state = SlotSampling(params, vocab_size)
        if state.has_penalties:
            prompt = mx.array(list(token_ids[:num_prompt_tokens]), dtype=mx.int32)
            state.prompt_mask = mx.zeros((vocab_size,), mx.bool_)
            state.prompt_mask[prompt] = True
            state.output_counts = mx.zeros((vocab_size,), mx.float32)
            if len(token_ids) > num_prompt_tokens:
                state.note(token_ids[num_prompt_tokens:])
        return state

    @property
    def has_penalties(self) -> bool:
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @property
    def is_rejection_sampled(self) -> bool:
        """Drafts are tried against the drafter's distribution. With a client's seed the text must not depend on it."""
        return self.params.temperature > 0.0 and not self.params.is_seeded

    @property
    def is_plain_greedy(self) -> bool:
        is_greedy = self.params.temperature == 0.0 and not self.params.logit_bias and not self.has_penalties
        return is_greedy and self.constraint is None

    def note(self, tokens: mx.array | Sequence[int]) -> None:
        """Count output tokens (n,); they may still be lazy."""
        if self.output_counts is not None:
            ids = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
            self.output_counts = self.output_counts.at[ids].add(1.0)


@dataclass
class SampledRow:
    """One position to sample: `position` is that of the new token; `drafts` stand between the state and it."""

    state: SlotSampling
    position: int
    drafts: Sequence[int] = ()
    proposal: Proposal | None = None  # the draft at this position, to be kept or rejected by rejection sampling
    mask: Mask | None = None  # of the tokens that may be drawn; None allows all


@dataclass
class Sampled:
    """What one call drew, still on the device: read it with `read`."""

    tokens: mx.array  # (N,) int32
    is_finite: mx.array  # (N,) bool: False where the logits held NaN or only infinities
    logprob_rows: list[int] = field(default_factory=list)
    chosen: mx.array | None = None  # (n,) log-probabilities of the drawn tokens of logprob_rows
    top_ids: mx.array | None = None  # (n, MAX_TOP_LOGPROBS)
    top: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        optional = (self.chosen, self.top_ids, self.top)
        return [self.tokens, self.is_finite, *(a for a in optional if a is not None)]

    def read_logprobs(self, rows: Sequence[SampledRow]) -> dict[int, TokenLogprob]:
        """By row index. Waits for the device."""
        if self.chosen is None or self.top is None or self.top_ids is None:
            return {}
        chosen, ids, top = to_list(self.chosen), to_list(self.top_ids), to_list(self.top)
        result = {}
        for i, row in enumerate(self.logprob_rows):
            wanted = rows[row].state.params.num_logprobs or 0
            best = [TopLogprob(token_id=t, logprob=p) for t, p in zip(ids[i][:wanted], top[i][:wanted], strict=True)]
            result[row] = TokenLogprob(logprob=chosen[i], top=best)
        return result


def sample(logits: mx.array, rows: Sequence[SampledRow]) -> Sampled:
    """Draw one token for each row.

    Args:
        logits: (N, V), any float type.
        rows: N.
    """
    assert logits.shape[0] == len(rows), f"{logits.shape[0]} rows of logits for {len(rows)} rows"
    others = [i for i, row in enumerate(rows) if not row.state.is_plain_greedy]
    if others or any(row.state.params.num_logprobs is not None for row in rows):
        logits = logits.astype(mx.float32)  # which keeps every value, and so the largest one's place
    greedy = mx.argmax(logits, axis=-1).astype(mx.int32)
    if not others:
        tokens = greedy
    elif len(others) == len(rows):
        tokens = _draw(logits, rows)
    else:
        index = mx.array(others)
        tokens = greedy
        tokens[index] = _draw(logits[index], [rows[i] for i in others])
    sampled = Sampled(tokens, mx.isfinite(mx.max(logits, axis=-1)))
    _add_logprobs(sampled, logits, rows)
    return sampled


def _draw(logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    adjusted = adjust(logits, rows)
    greedy = mx.argmax(adjusted, axis=-1).astype(mx.int32)
    if all(row.state.params.temperature == 0.0 for row in rows):
        return greedy
    drawn = _draw_from(probabilities(adjusted, rows), rows)
    is_greedy = mx.array([row.state.params.temperature == 0.0 for row in rows])
    return mx.where(is_greedy, greedy, drawn)


def _draw_from(p: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """One token (n,) for each row of p (n, V): drawn, or the row's draft where rejection sampling keeps it."""
    tested = [(i, row.proposal) for i, row in enumerate(rows) if row.proposal is not None]
    numbers = mx.array([_number(row, DRAW if row.proposal is None else RESIDUAL) for row in rows])
    if not tested:
        return draw_index(p, numbers)
    index = mx.array([i for i, _ in tested])
    accept = [_number(rows[i], ACCEPT) for i, _ in tested]
    is_kept, drafts, left = tried(p[index], [proposal for _, proposal in tested], accept)
    p[index] = left
    drawn = draw_index(p, numbers)
    drawn[index] = mx.where(is_kept, drafts, drawn[index])
    return drawn


def _number(row: SampledRow, stream: int) -> float:
    return uniform(row.state.params.seed, row.position, stream)


def adjust(logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """Logits (n, V) with each row's bias and penalties; -inf where its mask forbids a token."""
    biased = [(i, t, b) for i, row in enumerate(rows) for t, b in row.state.params.logit_bias.items()]
    if biased:
        at_row, at_token, bias = (mx.array(list(column)) for column in zip(*biased, strict=True))
        logits = logits.at[at_row, at_token].add(bias.astype(mx.float32))
    penalised = [i for i, row in enumerate(rows) if row.state.has_penalties]
    if len(penalised) == len(rows):
        logits = _penalise(logits, rows)
    elif penalised:
        index = mx.array(penalised)
        changed = _penalise(logits[index], [rows[i] for i in penalised])
        logits = mx.array(logits)  # the caller keeps its own
        logits[index] = changed
    return _forbid(logits, rows)


def _forbid(logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """The masks travel as bits, 32 tokens a word; ids beyond a mask are not the tokenizer's and are forbidden too."""
    masked = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return logits
    vocab_size = logits.shape[-1]
    words = mx.array(np.stack([mask for _, mask in masked]))  # (m, W)
    bits = (words[:, :, None] >> mx.arange(32, dtype=mx.uint32)) & 1
    allowed = bits.reshape(len(masked), -1)[:, :vocab_size].astype(mx.bool_)
    if allowed.shape[1] < vocab_size:
        allowed = mx.pad(allowed, [(0, 0), (0, vocab_size - allowed.shape[1])])
    if len(masked) == len(rows):
        return mx.where(allowed, logits, -mx.inf)
    index = mx.array([i for i, _ in masked])
    changed = mx.where(allowed, logits[index], -mx.inf)
    logits = mx.array(logits)
    logits[index] = changed
    return logits


def _penalise(logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """Penalties of rows (n, V): repetition over prompt and output, presence and frequency over the output."""
    held = [(row.state.output_counts, row.state.prompt_mask) for row in rows]
    counts = mx.stack([c for c, _ in held if c is not None])
    in_prompt = mx.stack([m for _, m in held if m is not None])
    drafted = [(i, token) for i, row in enumerate(rows) for token in row.drafts]
    if drafted:
        at_row, at_token = (mx.array(list(column)) for column in zip(*drafted, strict=True))
        counts = counts.at[at_row, at_token].add(1.0)
    params = [row.state.params for row in rows]
    repetition = mx.array([p.repetition_penalty for p in params])[:, None]
    presence = mx.array([p.presence_penalty for p in params])[:, None]
    frequency = mx.array([p.frequency_penalty for p in params])[:, None]
    repeated = mx.where(logits > 0, logits / repetition, logits * repetition)
    logits = mx.where(in_prompt | (counts > 0), repeated, logits)
    return logits - presence * (counts > 0) - frequency * counts


def probabilities(adjusted: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """Each row's distribution (n, V) float32 after temperature, top-k, top-p and min-p; greedy rows count as T = 1."""
    params = [row.state.params for row in rows]
    temperature = mx.array([p.temperature if p.temperature > 0 else 1.0 for p in params])[:, None]
    x = adjusted / temperature
    if any(p.top_k > 0 or p.top_p < 1.0 for p in params):
        x = _keep_top(x, params)
    if any(p.min_p > 0 for p in params):
        floor = mx.max(x, axis=-1, keepdims=True) + mx.log(mx.array([p.min_p for p in params]))[:, None]
        x = mx.where(x >= floor, x, -mx.inf)
    return _softmax(x)


def _softmax(x: mx.array) -> mx.array:
    return cpu_math.softmax(x) if is_cpu() else mx.softmax(x, axis=-1, precise=True)


def distribution(logits: mx.array, rows: Sequence[SampledRow]) -> mx.array:
    """The probabilities (n, V) that `sample` draws from, for rows with temperature above 0."""
    return probabilities(adjust(logits.astype(mx.float32), rows), rows)


def _keep_top(x: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """-inf outside the top-k and, within it, outside the smallest set of mass top_p. Ties with the last one stay."""
    vocab_size = x.shape[-1]
    ordered = -mx.sort(-x, axis=-1)
    k = mx.array([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params])[:, None]
    ordered = mx.where(mx.arange(vocab_size)[None] < k, ordered, -mx.inf)
    p_sorted = _softmax(ordered)
    mass_before = mx.cumsum(p_sorted, axis=-1) - p_sorted
    top_p = mx.array([p.top_p for p in params])[:, None]
    keep = (mass_before < top_p) & (ordered > -mx.inf)
    keep = keep | (mx.arange(vocab_size)[None] == 0)
    least = mx.min(mx.where(keep, ordered, mx.inf), axis=-1, keepdims=True)
    return mx.where(x >= least, x, -mx.inf)


def draw_index(p: mx.array, numbers: mx.array) -> mx.array:
    """Inverse transform: for each row of p (n, V), the first index whose cumulated mass exceeds number * total."""
    cumulated = mx.cumsum(p, axis=-1)
    index = mx.sum(cumulated <= numbers[:, None] * cumulated[:, -1:], axis=-1).astype(mx.int32)
    return mx.where(index < p.shape[-1], index, mx.argmax(p, axis=-1).astype(mx.int32))


def _add_logprobs(sampled: Sampled, logits: mx.array, rows: Sequence[SampledRow]) -> None:
    wanted = [i for i, row in enumerate(rows) if row.state.params.num_logprobs is not None]
    if not wanted:
        return
    index = mx.array(wanted)
    log_p = logits[index] - mx.logsumexp(logits[index], axis=-1, keepdims=True)
    n = min(MAX_TOP_LOGPROBS, logits.shape[-1])
    best = mx.argpartition(-log_p, kth=n - 1, axis=-1)[:, :n]
    values = mx.take_along_axis(log_p, best, axis=-1)
    by_rank = mx.argsort(-values, axis=-1)
    sampled.logprob_rows = wanted
    sampled.top_ids = mx.take_along_axis(best, by_rank, axis=-1)
    sampled.top = mx.take_along_axis(values, by_rank, axis=-1)
    sampled.chosen = mx.take_along_axis(log_p, sampled.tokens[index][:, None], axis=-1)[:, 0]
