"""The sampler against definitions written anew: its distribution, its keyed random numbers, its log-probabilities."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.messages import SamplingParams
from workers.sampling.sampler import SampledRow, SlotSampling, distribution, sample
from workers.sampling.uniform import ACCEPT, DRAFT, DRAW, RESIDUAL, uniform

pytestmark = pytest.mark.mlx

V = 12
PROMPT, OUTPUT = [1, 2, 2, 3], [3, 4, 4, 4]
LOGITS = np.random.default_rng(4).normal(size=V).astype(np.float32) * 1.5

CASES = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.4),
    "top-k": SamplingParams(top_k=4),
    "top-p": SamplingParams(top_p=0.6),
    "top-p 0": SamplingParams(top_p=0.0),
    "min-p": SamplingParams(min_p=0.15),
    "all filters": SamplingParams(temperature=1.6, top_k=7, top_p=0.85, min_p=0.1),
    "repetition": SamplingParams(repetition_penalty=1.5),
    "presence and frequency": SamplingParams(presence_penalty=0.7, frequency_penalty=-0.4),
    "bias": SamplingParams(logit_bias={0: 4.0, 11: -100.0}),
}


def exact(params, drafts=()):
    """(V,) by the definitions, in float64."""
    x = LOGITS.astype(np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    output = [*OUTPUT, *drafts]
    counts = np.bincount(output, minlength=V)
    for token in {*PROMPT, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    x = x - params.presence_penalty * (counts > 0) - params.frequency_penalty * counts
    p = np.exp(x / params.temperature)
    p /= p.sum()
    order = list(np.argsort(-p))
    if params.top_k:
        order = order[: params.top_k]
    within = p[order] / p[order].sum()
    kept, mass = [], 0.0
    for token, share in zip(order, within, strict=True):
        if kept and mass >= params.top_p:
            break
        kept.append(token)
        mass += share
    kept = [t for t in kept if p[t] >= params.min_p * p.max()]
    result = np.zeros(V)
    result[kept] = p[kept] / p[kept].sum()
    return result


def row(params, position=8, drafts=()):
    return SampledRow(SlotSampling.start(params, V, PROMPT + OUTPUT, len(PROMPT)), position, drafts)


@pytest.mark.parametrize("drafts", [(), (5, 5, 3)])
@pytest.mark.parametrize("case", CASES)
def test_the_distribution_is_that_of_the_definitions_also_behind_drafts(case, drafts):
    p = np.array(distribution(mx.array(LOGITS)[None], [row(CASES[case], drafts=drafts)]))[0]
    np.testing.assert_allclose(p, exact(CASES[case], drafts), atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_distribution(case):
    n = 6000
    state = row(CASES[case]).state
    rows = [SampledRow(state, position) for position in range(n)]
    drawn = np.array(sample(mx.broadcast_to(mx.array(LOGITS)[None], (n, V)), rows).tokens)
    observed, expected = np.bincount(drawn, minlength=V), exact(CASES[case]) * n
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) > 1:
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_rows_of_every_kind_in_one_call_draw_what_each_draws_alone():
    """Also checks that adjusting some rows leaves the log-probabilities, which are the model's own, alone."""
    mixed = [*CASES.values(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias={4: 9.0})]
    rows = [row(SamplingParams(**{**_fields(p), "seed": i, "num_logprobs": 3})) for i, p in enumerate(mixed)]
    logits = mx.random.normal((len(rows), V), key=mx.random.key(1))
    together = sample(logits, rows)
    logprobs = together.read_logprobs(rows)
    reference = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for i, one in enumerate(rows):
        assert together.tokens[i].item() == sample(logits[i : i + 1], [one]).tokens.item()
        assert logprobs[i].logprob == pytest.approx(reference[i, together.tokens[i].item()], abs=1e-5)
        order = np.argsort(-reference[i])[:3]
        assert [t.token_id for t in logprobs[i].top] == order.tolist()
        assert [t.logprob for t in logprobs[i].top] == pytest.approx(reference[i, order].tolist(), abs=1e-5)


def _fields(params):
    return {name: getattr(params, name) for name in params.__struct_fields__}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_of_nan_or_infinite_logits_is_marked_and_the_others_are_as_without_it(bad):
    logits = mx.random.normal((3, V), key=mx.random.key(2))
    rows = [row(SamplingParams(seed=i)) for i in range(3)]
    clean = sample(logits, rows)
    logits[1, 5] = bad
    broken = sample(logits, rows)
    assert broken.is_finite.tolist() == [True, False, True]
    assert [broken.tokens[i].item() for i in (0, 2)] == [clean.tokens[i].item() for i in (0, 2)]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_greedy_rows_of_16_bits_draw_as_in_32_equal_logits_and_bad_ones_included(dtype):
    """Alone they stay in 16 bits; beside a row that is drawn all are made 32."""
    rng = np.random.default_rng(1)
    logits = np.round(rng.normal(size=(64, 2000)) * 3)  # many largest ones
    logits[3, 7], logits[4], logits[5, :] = np.nan, -np.inf, np.inf
    given = mx.array(logits.astype(np.float32)).astype(dtype)
    greedy = [row(SamplingParams(temperature=0.0)) for _ in range(64)]
    alone = sample(given, greedy)
    beside = sample(mx.concatenate([given, given[:1]]), [*greedy, row(SamplingParams())])
    assert alone.is_finite.tolist() == beside.is_finite.tolist()[:-1]
    assert alone.is_finite.tolist() == [i not in (3, 4, 5) for i in range(64)]
    good = [i for i in range(64) if i not in (3, 4, 5)]
    assert [alone.tokens.tolist()[i] for i in good] == [beside.tokens.tolist()[i] for i in good]
    assert [alone.tokens.tolist()[i] for i in good] == [int(np.argmax(logits[i])) for i in good]


def test_a_banned_token_of_minus_infinity_is_not_an_error():
    logits = mx.array(LOGITS)[None]
    logits[0, 3] = -float("inf")
    assert sample(logits, [row(SamplingParams())]).is_finite.tolist() == [True]


@given(seed=st.integers(0, 2**63 - 1), position=st.integers(0, 2**20), stream=st.sampled_from([DRAW, ACCEPT, RESIDUAL]))
@settings(max_examples=200, deadline=None)
def test_uniform_is_a_function_of_its_key_and_float32_holds_it(seed, position, stream):
    u = uniform(seed, position, stream)
    assert 0.0 <= u < 1.0
    assert u == uniform(seed, position, stream) == float(np.float32(u))


@pytest.mark.parametrize("vary", ["seed", "position", "stream"])
def test_uniform_is_even_and_uncorrelated_along_each_part_of_its_key(vary):
    n = 20_000
    if vary == "stream":
        pairs = [(uniform(3, i, DRAW), uniform(3, i, DRAFT)) for i in range(n)]
    elif vary == "seed":
        pairs = [(uniform(i, 7), uniform(i + 1, 7)) for i in range(n)]
    else:
        pairs = [(uniform(5, i), uniform(5, i + 1)) for i in range(n)]
    first, second = np.array(pairs).T
    cells, _, _ = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(cells.reshape(-1)).pvalue > 1e-4
