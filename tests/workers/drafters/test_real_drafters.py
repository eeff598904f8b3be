"""The trained SmolLM2 drafters commit as many tokens a round as their file says, and fewer when anything is shifted.

Skipped without the drafters' folder (`DRAFTERS_FOLDER`) or the embedded model. The file's rounds were computed in
bfloat16, where near ties fall differently and one changed round moves all later ones: so every round is drafted from
the file's own anchor once, and means over the documents are compared.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support import replay  # isort: skip # loads a BLAS, so it goes before anything that imports MLX

from bench.quantize_drafter import quantize
from shared.messages import DraftRow, FeatureRows
from workers.draft_engine import DraftEngine
from workers.drafters.checkpoint import detect
from workers.drafters.registry import load_drafter, load_fusion

mx = replay.mx  # imported by it, after the BLAS

ROPE_THETA = 100_000.0  # of all reference drafters
LOOSE = 0.03  # of a mean over few documents

pytestmark = replay.NEEDS_REFERENCES


@pytest.fixture(scope="module")
def documents():
    return replay.load_documents(replay.NUM_DOCUMENTS)


@pytest.fixture(scope="module")
def target():
    return replay.Target(replay.MODEL_FILE)


@pytest.fixture(scope="module")
def hidden(target, documents):
    """For each document: every tapped block's rows, and the rows after the final norm."""
    used = sorted({t for name in replay.NUM_TOKENS for t in detect(replay.FOLDER / name).taps})
    near = sorted({*used, *(t + 1 for t in used)})
    rows = []
    for document in documents:
        taps, final = target.hidden(document["token_ids"], near)
        mx.eval(taps, final)
        rows.append((dict(zip(near, taps, strict=True)), final))
    return rows


def features(name, hidden, shift=0):
    config = detect(replay.FOLDER / name)
    fusion = load_fusion(config, mx.float32)
    return [fusion([t[i + shift] for i in config.taps] if config.taps else [final]) for t, final in hidden]


@pytest.mark.parametrize("name", replay.NUM_TOKENS)
def test_mean_acceptance_length_is_the_expected_one(name, target, documents, hidden):
    rounds = replay.play(replay.load(name, target), documents, features(name, hidden), replay.NUM_TOKENS[name])
    expected = [d["committed_per_round"][name] for d in documents]
    assert [sum(r) for r in rounds] == [sum(r) for r in expected], "the same tokens, in other portions"
    mean, wanted = replay.mean_acceptance_length(rounds), replay.mean_acceptance_length(expected)
    assert mean == pytest.approx(wanted, rel=replay.TOLERANCE)


@pytest.mark.parametrize("name", replay.NUM_TOKENS)
def test_most_rounds_commit_the_same_from_the_same_anchor(name, target, documents, hidden):
    expected = [d["committed_per_round"][name] for d in documents]
    drafter, rows = replay.load(name, target), features(name, hidden)
    rounds = replay.play(drafter, documents, rows, replay.NUM_TOKENS[name], follow=expected)
    pairs = [pair for ours, theirs in zip(rounds, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.93  # 0.955 to 0.986 measured in float32


@pytest.mark.parametrize("name", ["dflash-2l", "eagle3"])
def test_taps_one_block_off_lower_acceptance(name, target, documents, hidden):
    """The residual stream changes little from block to block, so this costs only 5 to 7 % here.

    That is still more than the mean's tolerance above, so a wrong convention cannot pass there.
    """
    few, rows = documents[:4], hidden[:4]
    drafter, num_tokens = replay.load(name, target), replay.NUM_TOKENS[name]
    right = replay.mean_acceptance_length(replay.play(drafter, few, features(name, rows), num_tokens))
    wrong = replay.mean_acceptance_length(replay.play(drafter, few, features(name, rows, shift=1), num_tokens))
    assert wrong < (1 - LOOSE) * right


@pytest.mark.parametrize("name", ["dflash-2l", "eagle3", "mtp"])
def test_features_one_position_off_lower_acceptance(name, target, documents, hidden):
    few, rows = documents[:4], features(name, hidden[:4])
    drafter, num_tokens = replay.load(name, target), replay.NUM_TOKENS[name]
    late = [mx.concatenate([r[:1], r[:-1]]) for r in rows]
    right = replay.mean_acceptance_length(replay.play(drafter, few, rows, num_tokens))
    wrong = replay.mean_acceptance_length(replay.play(drafter, few, late, num_tokens))
    assert wrong < 0.9 * right


@pytest.mark.parametrize("name", replay.NUM_TOKENS)
def test_eight_bits_lose_almost_no_acceptance(name, target, documents, hidden, tmp_path):
    told = quantize(replay.FOLDER / name, tmp_path / name, 8, 64)
    assert told["bytes_after"] < 0.56 * told["bytes_before"]
    small = detect(tmp_path / name)
    fusion = load_fusion(small, mx.float32)
    rows = [fusion([taps[i] for i in small.taps] if small.taps else [final]) for taps, final in hidden]
    drafter = load_drafter(small, mx.float32, *replay.tables(target.embedding))
    num_tokens = replay.NUM_TOKENS[name]
    eight = replay.mean_acceptance_length(replay.play(drafter, documents, rows, num_tokens))
    right = replay.mean_acceptance_length(
        replay.play(replay.load(name, target), documents, features(name, hidden), num_tokens)
    )
    print(f"{name}: {right:.4f}, in 8 bits {eight:.4f}; {told['bytes_before']} bytes, then {told['bytes_after']}")
    assert eight > (1 - LOOSE) * right


# ------------------------------------------------ through the drafter worker's own engine


def play_engine(engine, documents, rows, num_tokens):
    """Tokens of each round, as `replay.play` counts them, by requests and features as the worker gets them."""
    rounds = [[] for _ in documents]
    sent = [0] * len(documents)
    anchors = [d["num_prompt_tokens"] for d in documents]
    while running := [i for i, d in enumerate(documents) if anchors[i] < len(d["token_ids"]) - 1]:
        asked = []
        for i in running:
            first, end = sent[i], anchors[i] + 1
            known = FeatureRows(request_id=str(i), start=max(0, first - 1), num_rows=end - 1 - max(0, first - 1))
            engine.take_features(known, np.array(rows[i][known.start : end - 1]))
            tokens = documents[i]["token_ids"][first:end]
            asked.append(DraftRow(request_id=str(i), start=first, token_ids=tokens, num_tokens=num_tokens))
            engine.take_tokens(asked[-1])
            sent[i] = end
        for i, draft in zip(running, engine.draft(asked), strict=True):
            truth = documents[i]["token_ids"][anchors[i] + 1 :]
            n = 0
            while n < min(len(truth), num_tokens) and draft.token_ids[n] == truth[n]:
                n += 1
            rounds[i].append(min(n + 1, len(truth)))
            anchors[i] += rounds[i][-1]
    return rounds


def wrong_rope(drafter):
    """DFlash: queries one position late, for keys where they were. The recursive heads do not notice that (within 1 %
    over four documents), so theirs rotates neighbours in place of halves.
    """
    for layer in getattr(drafter, "layers", []):
        right = layer.attention.queries
        layer.attention.queries = lambda x, positions, right=right: right(x, positions + 1)
    if hasattr(drafter, "attention"):

        def neighbours(x, offset):
            return mx.fast.rope(x, x.shape[-1], traditional=True, base=ROPE_THETA, scale=1.0, offset=offset)

        drafter.attention._rope = neighbours


def shift_slot(drafter):
    """DFlash: predictions read one row early. The others have one row, so the anchor's feature is one too old."""
    if hasattr(drafter, "first_row"):
        drafter.first_row -= 1
        return
    right = drafter.extend_rows

    def extend_rows(states, features, token_ids):
        ends = np.cumsum([len(ids) for ids in token_ids])
        parts = [features[end - len(ids) : end] for ids, end in zip(token_ids, ends.tolist(), strict=True)]
        right(states, mx.concatenate([mx.concatenate([rows[:1], rows[:-1]]) for rows in parts]), token_ids)

    drafter.extend_rows = extend_rows


@pytest.mark.parametrize("name", ["dflash-2l", "eagle3", "mtp"])
def test_a_wrong_rope_slot_or_tap_lowers_acceptance_in_the_workers_engine(name, target, documents, hidden):
    few, num_tokens = documents[:3], replay.NUM_TOKENS[name]

    def mean(change=None, shift=0):
        drafter = replay.load(name, target)
        if change is not None:
            change(drafter)
        rounds = play_engine(DraftEngine(drafter, True), few, features(name, hidden[:3], shift), num_tokens)
        return replay.mean_acceptance_length(rounds)

    right = mean()
    expected = [d["committed_per_round"][name] for d in few]
    assert right == pytest.approx(replay.mean_acceptance_length(expected), rel=2 * LOOSE)
    assert mean(wrong_rope) < (1 - LOOSE) * right
    assert mean(shift_slot) < 0.9 * right
    if detect(replay.FOLDER / name).taps:
        assert mean(shift=1) < right
