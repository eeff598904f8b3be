"""What is trained is what serves; the optimiser, the loss and the state of a run."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from training_rig import KINDS, make, random_documents, spoken_documents, tiny_target

from bench.training import checkpoint, evaluate, export
from bench.training.documents import Batches, before_loop, is_looped
from bench.training.losses import LossOptions, dpace, head_gradient
from bench.training.optimiser import Optimiser, cosine, orthogonal
from bench.training.parts import Batch
from bench.training.run import Run, RunOptions
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, load_fusion, tables

pytestmark = pytest.mark.mlx


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return tiny_target(tmp_path_factory.mktemp("target"))


def served_logits(folder, target, tokens, anchor, num_tokens):
    """(num_tokens, V) from the workers' own modules, each step told the document's token."""
    config = detect(folder, target.config)
    fusion = load_fusion(config, mx.float32)
    drafter = load_drafter(config, mx.float32, *tables(target.embedding, target.head))
    taps, final = target.forward(mx.array([tokens]))
    rows = fusion([taps[t][0] for t in config.taps] if config.taps else [final[0]])
    state = drafter.new_state()
    drafter.extend([state], [rows[:anchor]], [tokens[:anchor]])
    seen = []

    def sampler(logits, step):
        seen.append(logits[0])
        return mx.array([tokens[anchor + 1 + step]])

    mx.eval(drafter.draft([state], [tokens[anchor]], num_tokens, sampler).token_ids)
    return mx.stack(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_training_forward_is_the_serving_forward(kind, target, tmp_path):
    drafter, params = make(kind, target, scaled=True)
    export.export(tmp_path, drafter, params, "", dtype=mx.float32)
    documents = random_documents(num=2, low=40, high=41)
    k = drafter.num_predictions
    anchors = mx.array([[3, 11, 30], [1, 20, 34]], dtype=mx.int32)
    tokens = mx.array(np.stack([documents[0], documents[1]]).astype(np.int32))
    padded = mx.pad(tokens, [(0, 0), (0, 9)])
    batch = Batch(padded, anchors, mx.full(anchors.shape, k))
    rows = drafter.forward(params, batch, drafter.features(target, padded), mx.float32)
    logits = rows @ target.head.T
    for b in range(2):
        for a in range(3):
            expected = served_logits(tmp_path, target, documents[b].tolist(), anchors[b, a].item(), k)
            scale = mx.abs(expected).max().item()
            assert mx.abs(logits[b, a] - expected).max().item() < 1e-4 * max(1.0, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_an_anchors_rows_see_nothing_after_it(kind, target):
    """But for the tokens that a recursive head is told step by step."""
    drafter, params = make(kind, target)
    tokens = random_documents(num=1, low=40, high=41)[0].astype(np.int32)
    other = tokens.copy()
    other[20 + drafter.num_predictions :] = 9
    anchors, k = mx.array([[20]]), drafter.num_predictions

    def rows(of):
        batch = Batch(mx.array(of[None]), anchors, mx.array([[k]]))
        return drafter.forward(params, batch, drafter.features(target, batch.tokens), mx.float32)

    assert mx.allclose(rows(tokens), rows(other), atol=1e-5)


def test_chunked_gradient_is_that_of_the_plain_loss():
    n, k, h, v, share = 5, 3, 6, 11, 0.1
    keys = mx.random.split(mx.random.key(0), 4)
    hidden, teacher = mx.random.normal((n, k, h), key=keys[0]), mx.random.normal((n, k, h), key=keys[1])
    head, labels = mx.random.normal((v, h), key=keys[2]), mx.random.randint(0, v, (n, k), key=keys[3])
    is_valid = mx.array([[1, 1, 1]] * 4 + [[1, 0, 0]], dtype=mx.float32)

    def losses(rows):
        q = rows @ head.T - mx.logsumexp(rows @ head.T, axis=-1, keepdims=True)
        p = teacher @ head.T - mx.logsumexp(teacher @ head.T, axis=-1, keepdims=True)
        return (mx.exp(p) * (p - q)).sum(axis=-1), -mx.take_along_axis(q, labels[..., None], axis=-1)[..., 0]

    weights = dpace(mx.exp(-losses(hidden)[1]), is_valid, 0.5)

    def plain(rows):
        divergence, cross_entropy = losses(rows)
        return ((divergence + share * cross_entropy) * weights).sum() / weights.sum()

    loss, gradient = head_gradient(hidden, teacher, labels, is_valid, head, LossOptions(share, 1.0, 0.5, rows=6))
    assert mx.allclose(gradient, mx.grad(plain)(hidden), atol=1e-6)
    assert loss.item() == pytest.approx(((losses(hidden)[1] * is_valid).sum() / is_valid.sum()).item(), rel=1e-5)


def test_dpace_weights_are_the_chances_to_get_there():
    q = [0.8, 0.4, 0.6]
    weights = dpace(mx.array([q]), mx.array([[1.0, 1.0, 0.0]]), 0.5)
    first, second = 0.9, 0.9 * 0.7
    assert weights.tolist()[0] == pytest.approx([first + second, second, 0.0])


def test_muon_moves_matrices_by_their_orthogonal_factor():
    """Against the same rounds written plainly, in float64."""
    rng = np.random.default_rng(0)
    value, gradient, momentum = (rng.standard_normal((4, 7)) for _ in range(3))
    made = Optimiser(matrix_rate=0.1, max_norm=1e9)
    state = {"w.m": mx.array(momentum.astype(np.float32))}
    arrays = [mx.array(a.astype(np.float32)) for a in (value, gradient)]
    new, held, _ = made.step({"w": arrays[0]}, {"w": arrays[1]}, state, mx.array(1.0), mx.array(0.5))

    kept = 0.95 * momentum + 0.05 * gradient
    x = 0.05 * gradient + 0.95 * kept
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    expected = value - 0.1 * 0.5 * 0.2 * 7**0.5 * x
    assert np.allclose(np.array(held["w.m"]), kept, atol=1e-6)
    assert np.allclose(np.array(new["w"]), expected, atol=0.03 * 0.1)  # bfloat16 rounds


def test_orthogonal_has_singular_values_near_one():
    x = mx.array(np.random.default_rng(1).standard_normal((3, 20, 8)).astype(np.float32))
    values = np.linalg.svd(np.array(orthogonal(x)), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3


def test_adamw_takes_its_first_step_by_the_rate():
    made = Optimiser(norm_rate=0.01, max_norm=1e9)
    params = {"n": mx.array([1.0, 2.0])}
    new, _, _ = made.step(params, {"n": mx.array([3.0, -0.2])}, made.init(params), mx.array(1.0), mx.array(1.0))
    assert np.array(new["n"]).tolist() == pytest.approx([0.99, 2.01], abs=1e-5)


def test_schedule_warms_up_then_falls_to_its_end():
    assert cosine(0.02) == pytest.approx(0.5)
    assert cosine(0.04) == pytest.approx(1.0)
    assert cosine(1.0) == pytest.approx(0.0, abs=1e-9)


# ------------------------------------------------ a run


def a_run(kind, target, steps, documents=None, seed=3):
    drafter, _ = make(kind, target)
    params = drafter.initialise(seed, target, norm_scale=0.2)
    documents = random_documents() if documents is None else documents
    batches = Batches(documents, 256, 0.15, drafter.num_predictions)
    options = RunOptions(steps=steps, is_quiet=True, evaluate_every=1e9)
    return Run(drafter, target, documents, batches, Optimiser(), LossOptions(), options, params, mx.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_within_twenty_steps(kind, target):
    run = a_run(kind, target, 20, spoken_documents(target))
    run.train()
    assert np.isfinite(run.losses).all()
    assert np.mean(run.losses[-3:]) < 0.97 * np.mean(run.losses[:3])


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(target, tmp_path):
    whole = a_run("eagle3", target, 6)
    whole.train()
    first = a_run("eagle3", target, 6)
    first.options = dataclasses.replace(first.options, steps=3)
    first.train(tmp_path / "state.safetensors")
    second = a_run("eagle3", target, 6, seed=4)
    second.resume(tmp_path / "state.safetensors")
    # The schedule of the first half was that of a shorter run, so only its data and its state are compared.
    assert second.number == 3 and second.batches.position == 3
    for name, value in first.params.items():
        assert mx.array_equal(value, second.params[name])
    third = a_run("eagle3", target, 6)
    third.params, third.state, third.number, third.batches.position = first.params, first.state, 3, 3
    second.train()
    third.train()
    assert second.losses[-3:] == pytest.approx(third.losses[-3:], rel=1e-6)
    for name, value in third.params.items():
        assert mx.allclose(value, second.params[name], atol=1e-4)  # bfloat16 inside; a step moves by 1e-2
    assert len(whole.losses) == second.number == 6


def test_a_large_state_is_stored_in_at_most_the_allowed_bytes(tmp_path, monkeypatch):
    params = {"w": mx.random.normal((64, 64)), "n": mx.ones((64,))}
    state = {"w.m": mx.random.normal((64, 64)), "n.m": mx.ones((64,))}
    for limit, tolerance in ((1 << 20, 0.0), (26_000, 0.02), (16_000, 0.05)):
        monkeypatch.setattr(checkpoint, "MAX_BYTES", limit)
        checkpoint.save(tmp_path / "c.safetensors", params, state, {"number": 5})
        assert (tmp_path / "c.safetensors").stat().st_size < limit + 2000
        stored, held, facts = checkpoint.load(tmp_path / "c.safetensors")
        assert facts == {"number": 5}
        assert mx.abs(stored["w"] - params["w"]).max().item() <= tolerance
        assert mx.abs(held["w.m"] - state["w.m"]).max().item() <= tolerance


# ------------------------------------------------ evaluation


def documents_of(num):
    documents = random_documents(num)
    return [documents[i] for i in range(num)], documents.prompts.tolist()


def test_an_oracle_commits_k_and_one_each_round():
    texts, prompts = documents_of(4)
    found = evaluate.accept(lambda b: b.num_valid[..., None] > mx.arange(4), texts, prompts, 4)
    for document, prompt, rounds in zip(texts, prompts, found.rounds, strict=True):
        assert sum(rounds) == len(document) - prompt - 1
        assert all(r == 5 for r in rounds[:-1])
    assert found.by_position == [1.0] * 4


def test_a_drafter_that_is_never_right_commits_one_each_round():
    texts, prompts = documents_of(3)
    found = evaluate.accept(lambda b: mx.zeros((*b.anchors.shape, 4), dtype=mx.bool_), texts, prompts, 4)
    assert found.mean_length == 1.0
    assert found.by_position == [0.0] * 4


def test_walk_stops_at_the_first_wrong_draft_and_at_the_end():
    matches = np.zeros((6, 3), dtype=bool)
    matches[0] = [True, False, True]  # commits 2: to anchor 2
    matches[2] = [True, True, True]  # commits 4: the end
    rounds, reached, accepted = evaluate.walk(matches)
    assert rounds == [2, 4]
    assert reached.tolist() == [2, 2, 1]
    assert accepted.tolist() == [2, 1, 1]


# ------------------------------------------------ data


def test_batches_hold_whole_documents_and_anchors_of_their_answers():
    documents = random_documents(num=12)
    batches = Batches(documents, 128, 0.2, 4)
    batch, num_answer = next(iter(batches))
    tokens, anchors, valid = (np.array(a) for a in (batch.tokens, batch.anchors, batch.num_valid))
    texts = {documents[i].tobytes(): i for i in range(12)}
    for b in range(len(tokens)):
        index = next(i for text, i in texts.items() if tokens[b].astype(np.uint16).tobytes().startswith(text))
        n, first = documents.lengths[index], documents.prompts[index]
        used = anchors[b][valid[b] > 0]
        assert len(set(used)) == len(used) > 0
        assert used.min() >= first and used.max() <= n - 2
        assert (valid[b][valid[b] > 0] == np.minimum(n - 1 - used, 4)).all()
    assert num_answer > 0


def test_what_stands_before_a_loop_is_kept():
    rng = np.random.default_rng(0)
    text, loop = rng.integers(0, 500, 120), rng.integers(500, 900, 9)
    kept = before_loop(np.concatenate([text, np.tile(loop, 12)]))
    assert (kept[:120] == text).all() and 120 <= len(kept) <= 120 + 9
    assert not is_looped(kept)
    assert len(before_loop(text)) == 120 and not len(before_loop(text[:0]))
    assert len(before_loop(np.tile(loop, 12))) <= 9
    for length, is_loop in ((12, False), (20, True)):  # a phrase may come back, a paragraph not
        again = np.concatenate([text, text[:length], rng.integers(0, 500, 60)])
        assert (len(before_loop(again)) < len(again)) == is_loop


def test_loops_are_told_from_text():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 500, 120)
    assert not is_looped(text)
    assert is_looped(np.tile(text[:10], 12))
    assert is_looped(np.concatenate([text, np.tile(text[:7], 10)]))
