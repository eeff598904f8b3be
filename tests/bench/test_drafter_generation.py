"""Documents that the slot engine cuts from its log are what the target says, one sequence at a time."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from training_rig import tiny_target

from bench.training.documents import Documents
from bench.training.generate import GenerateOptions, Generator
from bench.training.prompts import Openings
from bench.training.sampler import sample

pytestmark = pytest.mark.mlx

OPENINGS = Openings([[3, 20, 21], [3, 22], [4, 30, 31, 32]], [0.5, 0.3, 0.2], [10, 11, 12], [10])
OPTIONS = GenerateOptions(
    num_slots=8, capacity=40, max_answer=14, max_user=8, min_user=1, min_p=1e-6, steps_per_read=16, seed=5
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Its end token is made likely, so that turns end by themselves now and then."""
    made = tiny_target(tmp_path_factory.mktemp("target"))
    _, final = made.forward(mx.array(np.random.default_rng(0).integers(12, 200, (4, 30))))
    logits, mean = final @ made.head.T, final.mean(axis=(0, 1))
    wanted = (mx.logsumexp(logits, axis=-1) - 2.0).mean()  # about one token in eight
    made.model.model.embed_tokens.weight[10] = wanted * mean / mx.square(mean).sum()
    return made


@pytest.fixture(scope="module")
def generator(target):
    return Generator(target, OPENINGS, OPTIONS)


@pytest.fixture(scope="module")
def documents(generator):
    return Documents.join(list(generator.run(num_steps=320)))


def test_documents_are_a_prefix_a_user_turn_the_template_and_an_answer(documents):
    assert len(documents) > 10
    for i in range(len(documents)):
        tokens, prompt = documents[i].tolist(), int(documents.prompts[i])
        prefix = next(p for p in OPENINGS.prefixes if tokens[: len(p)] == p)
        assert tokens[prompt - 3 : prompt] == OPENINGS.turn
        user = tokens[len(prefix) : prompt - 3]
        assert 1 <= len(user) <= 8 and 10 not in user
        answer = tokens[prompt:]
        assert len(answer) <= 14 and 10 not in answer[:-1]
        assert answer[-1] == 10 or answer[-1] < 2 or len(answer) == 14 or len(tokens) == 40


def test_greedy_answers_are_the_targets_own(documents, target):
    greedy = np.flatnonzero(documents.temperatures == 0)
    assert len(greedy) > 3
    for i in greedy[:6]:
        tokens, prompt = documents[int(i)].astype(np.int32), int(documents.prompts[i])
        _, final = target.forward(mx.array(tokens[None]))
        logits = np.array(target.model.logits(final)[0])
        chosen = logits[np.arange(prompt - 1, len(tokens) - 1), tokens[prompt:]]
        best = logits[prompt - 1 : -1].max(axis=-1)
        assert np.allclose(chosen, best, atol=1e-4)  # ties may fall differently


def test_same_seed_gives_the_same_documents(target, documents):
    again = Documents.join(list(Generator(target, OPENINGS, OPTIONS).run(num_steps=320)))
    assert np.array_equal(again.tokens, documents.tokens)


def test_documents_survive_a_file(documents, tmp_path):
    documents.save(tmp_path / "d.npz")
    loaded = Documents.load(tmp_path / "d.npz")
    assert np.array_equal(loaded.tokens, documents.tokens) and len(loaded) == len(documents)
    assert len(Documents.join([loaded, documents])) == len(documents)  # prompts are unique


def test_sampler_draws_by_the_distribution_and_never_the_unlikely():
    logits = mx.array(np.log(np.array([[0.5, 0.3, 0.15, 0.049, 0.001]], dtype=np.float32)))
    rows = mx.broadcast_to(logits, (20_000, 5))
    drawn = np.array(sample(rows, mx.ones((20_000,)), 0.01, mx.random.key(1)))
    shares = np.bincount(drawn, minlength=5) / 20_000
    assert shares[4] == 0  # below 1 % of the likeliest
    assert shares[:4] == pytest.approx(np.array([0.5, 0.3, 0.15, 0.049]) / 0.999, abs=0.015)
    cold = np.array(sample(rows, mx.zeros((20_000,)), 0.01, mx.random.key(1)))
    assert (cold == 0).all()


def test_sampler_reaches_every_block_of_a_wide_vocabulary():
    logits = mx.zeros((4000, 1000))
    drawn = np.array(sample(logits, mx.ones((4000,)), 0.01, mx.random.key(2)))
    assert drawn.min() < 10 and drawn.max() > 989 and abs(drawn.mean() - 499.5) < 15
