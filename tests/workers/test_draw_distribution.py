"""The first tokens are distributed as by plain sampling, whatever is drafted: chi-square tests of their joint counts.

The target's next token depends on the last one only, so that the joint distribution is known. Drafts come as a function
of the text (matching rule), or drawn from a q of their own by the drafter worker's sampler (rejection sampling).
"""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from scipy import stats

from shared.messages import DraftDistribution, SamplingParams, SequenceStart, Step, StepRow
from tests.support.engine_rig import make_engine
from workers.accept import count_accepted
from workers.drafters.draw import DraftSampler
from workers.sampling.uniform import DRAFT, uniform

pytestmark = pytest.mark.mlx

TINY = 5
NUM_DRAWS = 20_480
FEW_DRAWS = 5_120  # enough to see what is wrong by much
SLOTS = 256
TABLE = np.random.default_rng(2).normal(size=(TINY, TINY)) * 1.2


class Bigram:
    """A target whose next token depends on the last one only, so that its joint distribution is known."""

    vocab_size = TINY

    def layer_specs(self):
        return []

    def __call__(self, inputs, cache=None, input_embeddings=None):
        return mx.array(TABLE, dtype=mx.float32)[inputs]


CASES = {
    "plain": SamplingParams(),
    "temperature": SamplingParams(temperature=1.7),
    "top-k": SamplingParams(top_k=3),
    "top-p": SamplingParams(top_p=0.7),
    "min-p": SamplingParams(min_p=0.2),
    "bias": SamplingParams(logit_bias={0: 1.5, 4: -2.0}),
    "penalties": SamplingParams(repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7),
}


def next_distribution(params, history):
    """(TINY,) probabilities after `history`, whose first token is the prompt; written from the definitions alone."""
    x = TABLE[history[-1]].copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    counts = np.bincount(history[1:], minlength=TINY)
    seen = np.bincount(history, minlength=TINY) > 0
    r = params.repetition_penalty
    x = np.where(seen, np.where(x > 0, x / r, x * r), x)
    x = x - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    p = np.exp(x / params.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if params.top_k:
        p[order[params.top_k :]] = 0
        p /= p.sum()
    if params.top_p < 1:
        cut = int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1
        p[order[cut:]] = 0
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def joint(params):
    """Probabilities of the first three tokens, (TINY**3,)."""
    result = np.zeros((TINY, TINY, TINY))
    for a, b, c in itertools.product(range(TINY), repeat=3):
        result[a, b, c] = (
            next_distribution(params, [0])[a]
            * next_distribution(params, [0, a])[b]
            * next_distribution(params, [0, a, b])[c]
        )
    return result.reshape(-1)


# ------------------------------------------------ drafters: two drafts for each text [0, a]

Proposed = tuple[list[int], DraftDistribution | None]
Propose = Callable[[SamplingParams, Sequence[int], Sequence[int]], list[Proposed]]
"""(parameters, seeds, first tokens) of a batch -> its drafts."""


def fixed(choose: Callable[[SamplingParams, int, int], list[int]]) -> Propose:
    """A drafter whose drafts are a function of the text."""

    def propose(params, seeds, first_tokens):
        return [(choose(params, seed, first), None) for seed, first in zip(seeds, first_tokens, strict=True)]

    propose.__name__ = choose.__name__
    return propose


@fixed
def good(params, seed, first):
    a = int(np.argmax(next_distribution(params, [0, first])))
    return [a, int(np.argmax(next_distribution(params, [0, first, a])))]


@fixed
def bad(params, seed, first):
    a = int(np.argmin(TABLE[first]))
    return [a, int(np.argmin(TABLE[a]))]


@fixed
def adversarial(params, seed, first):
    """Knows the random numbers: proposes what will be drawn where that is token 1, to have more of it, else a lie."""
    p = np.cumsum(next_distribution(params, [0, first]))
    drawn = int(np.searchsorted(p, uniform(seed, 2), side="right"))
    return [1, 1] if drawn == 1 else [(drawn + 1) % TINY, 1]


def drawn(table: np.ndarray, name: str, lie: float = 1.0) -> Propose:
    """A drafter that draws from its own table of logits.

    Args:
        lie: power of the probabilities that it says it drew from; 1 is the truth.
    """

    def propose(params, seeds, first_tokens):
        sampler = DraftSampler([msgspec.structs.replace(params, seed=seed) for seed in seeds], [2] * len(seeds))
        tokens, last = [], mx.array(list(first_tokens))
        for step in range(2):
            last = sampler(mx.array(table, dtype=mx.float32)[last], step)
            tokens.append(np.array(last).tolist())
        told = sampler.distributions([2] * len(seeds))
        return [([a, b], _with_power(q, lie)) for a, b, q in zip(*tokens, told, strict=True)]

    propose.__name__ = name
    return propose


def _with_power(q: DraftDistribution, power: float) -> DraftDistribution:
    if power == 1.0:
        return q
    rows = np.frombuffer(q.probabilities, "<f4").reshape(-1, q.width) ** power
    rows = (rows / rows.sum(axis=1, keepdims=True)).astype("<f4")
    return msgspec.structs.replace(q, probabilities=rows.tobytes())


NOISE = np.random.default_rng(3).normal(size=(TINY, TINY))
drawn_well = drawn(TABLE + 0.3 * NOISE, "drawn_well")
drawn_badly = drawn(-TABLE, "drawn_badly")
drawn_against = drawn(np.eye(TINY)[np.argmin(TABLE, axis=1)] * 6.0, "drawn_against")  # nearly always the least likely


def counts_of_joint(
    params: SamplingParams, propose: Propose, num_draws: int = NUM_DRAWS, count: Callable | None = None
) -> tuple[np.ndarray, float]:
    """Histogram of the first three tokens (TINY**3,) over so many seeds, and the share of accepted drafts."""
    engine = make_engine(Bigram(), num_slots=SLOTS, classes=[16])
    if count is not None:
        engine.count_accepted = count
    histogram, num_accepted, num_drafted = np.zeros((TINY, TINY, TINY)), 0, 0
    for first in range(0, num_draws, SLOTS):
        seeds = [(first + slot) * 7919 for slot in range(SLOTS)]
        starts = [
            SequenceStart(
                slot=slot, request_id=str(slot), sampling=msgspec.structs.replace(params, seed=seed),
                num_prompt_tokens=1, token_ids=[0],
            )
            for slot, seed in enumerate(seeds)
        ]  # fmt: skip
        texts = [[0] for _ in seeds]
        rows = [StepRow(slot=slot, start=0, capacity=8, token_ids=[0]) for slot in range(SLOTS)]
        proposed: list[Proposed] = []
        while rows:
            step = Step(epoch=1, step_id=1, starts=starts, decodes=rows, prefills=[])
            starts = []
            for row in engine.finish(engine.begin(step)).rows:
                num_accepted += len(row.token_ids) - 1
                texts[row.slot] += row.token_ids
            if not proposed:
                proposed = propose(params, seeds, [text[1] for text in texts])
                drafted = proposed
                num_drafted += sum(len(tokens) for tokens, _ in drafted)
            else:
                drafted = [([], None)] * SLOTS
            rows = [
                StepRow(
                    slot=slot, start=len(text) - 1, capacity=8, token_ids=[text[-1], *drafts], num_drafts=len(drafts),
                    draft_distribution=q,
                )
                for slot, (text, (drafts, q)) in enumerate(zip(texts, drafted, strict=True))
                if len(text) < 4
            ]  # fmt: skip
        for text in texts:
            histogram[text[1], text[2], text[3]] += 1
    return histogram.reshape(-1), num_accepted / num_drafted


def p_value(histogram, expected):
    """Of Pearson's test; cells with fewer than five expected draws are one cell."""
    assert histogram[expected == 0].sum() == 0, "a token was drawn that the filters exclude"
    wanted = expected * histogram.sum()
    small = wanted < 5
    observed = np.append(histogram[~small], histogram[small].sum())
    wanted = np.append(wanted[~small], wanted[small].sum())
    keep = wanted > 0
    return float(stats.chisquare(observed[keep], wanted[keep]).pvalue)


REJECTED_CASES = [("plain", drawn_well), ("plain", drawn_badly), *((case, drawn_against) for case in CASES)]


@pytest.mark.parametrize(
    ("case", "propose"),
    [("plain", good), ("plain", bad), *((case, adversarial) for case in CASES), *REJECTED_CASES],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_the_first_tokens_are_distributed_as_by_plain_sampling(case, propose):
    histogram, accepted = counts_of_joint(CASES[case], propose)
    assert histogram.sum() == NUM_DRAWS
    assert p_value(histogram, joint(CASES[case])) > 1e-3
    assert accepted >= {"good": 0.2, "drawn_well": 0.7}.get(propose.__name__, 0.0)


def test_rejection_sampling_accepts_as_often_as_the_two_distributions_overlap():
    """sum of min(p, q), the most that any rule can reach; the matching rule accepts less often."""
    params = SamplingParams(temperature=1.7)
    own = np.exp((TABLE + 0.3 * NOISE) / 1.7)
    own /= own.sum(axis=1, keepdims=True)
    first = next_distribution(params, [0])
    p = np.stack([next_distribution(params, [0, a]) for a in range(TINY)])
    overlap = np.minimum(p, own).sum(axis=1)
    both = first @ (overlap + np.einsum("ab,b->a", np.minimum(p, own), overlap))
    _, accepted = counts_of_joint(params, drawn_well, FEW_DRAWS)
    assert 2 * accepted == pytest.approx(both, rel=0.02)
    _, by_matching = counts_of_joint(msgspec.structs.replace(params, is_seeded=True), drawn_well, FEW_DRAWS)
    assert by_matching < 0.7 * accepted


def test_a_clients_seed_gives_the_same_tokens_whatever_is_drafted():
    params = SamplingParams(is_seeded=True)
    expected, _ = counts_of_joint(params, good, FEW_DRAWS)
    got, _ = counts_of_joint(params, drawn_badly, FEW_DRAWS)
    assert got.tolist() == expected.tolist()


def accept_all(drafts, drawn):
    return len(drafts)


def accept_first(drafts, drawn):
    return max(1, count_accepted(drafts, drawn)) if drafts else 0


@pytest.mark.parametrize("count", [accept_all, accept_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("propose", [good, bad, drawn_well, drawn_badly], ids=lambda f: f.__name__)
def test_a_biased_acceptance_is_seen_by_the_chi_square_test(propose, count):
    histogram, _ = counts_of_joint(CASES["plain"], propose, FEW_DRAWS, count)
    assert p_value(histogram, joint(CASES["plain"])) < 1e-6


def test_a_drafter_that_misstates_its_distribution_is_seen_by_the_chi_square_test():
    propose = drawn(TABLE + 0.3 * NOISE, "liar", lie=0.7)
    assert p_value(counts_of_joint(CASES["plain"], propose)[0], joint(CASES["plain"])) < 1e-6


def test_an_accept_test_with_the_drafters_own_number_is_seen_by_the_chi_square_test(monkeypatch):
    """The draft's draw and its accept test must be independent."""
    monkeypatch.setattr("workers.sampling.sampler.ACCEPT", DRAFT)
    assert p_value(counts_of_joint(CASES["plain"], drawn_badly, FEW_DRAWS)[0], joint(CASES["plain"])) < 1e-6
