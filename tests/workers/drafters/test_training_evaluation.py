"""The training's own evaluation finds the acceptance that the reference drafters' file states.

Skipped as test_real_drafters.py is. The file's rounds were computed in bfloat16 on another machine: few of them differ.
"""

from __future__ import annotations

import pytest

from bench.training import build, evaluate
from bench.training.target import load_target
from tests.support import replay  # loads a BLAS, so it goes before anything that imports MLX

mx = replay.mx

pytestmark = replay.NEEDS_REFERENCES


@pytest.fixture(scope="module")
def target():
    return load_target(str(replay.MODEL_FILE), dtype="float32")


@pytest.mark.parametrize("name", replay.NUM_TOKENS)
def test_evaluation_finds_the_stated_acceptance(name, target):
    documents = replay.load_documents(replay.NUM_DOCUMENTS)
    drafter = build.of_folder(replay.FOLDER / name, target)
    target.tap(drafter.taps)
    draft = evaluate.drafting(drafter, build.read(replay.FOLDER / name, drafter), target, mx.float32)
    texts, prompts = [d["token_ids"] for d in documents], [d["num_prompt_tokens"] for d in documents]
    found = evaluate.accept(draft, texts, prompts, drafter.num_predictions, replay.NUM_TOKENS[name])
    expected = [d["committed_per_round"][name] for d in documents]
    assert [sum(r) for r in found.rounds] == [sum(r) for r in expected]
    wanted = sum(map(sum, expected)) / sum(map(len, expected))
    assert found.mean_length == pytest.approx(wanted, rel=replay.TOLERANCE)
    assert found.mean_of_documents == pytest.approx(replay.mean_acceptance_length(expected), rel=replay.TOLERANCE)
