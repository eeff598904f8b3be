"""The training's own evaluation finds the acceptance that the reference drafters' file states.

Skipped as test_real_drafters.py is. The file's rounds were computed in bfloat16 on another machine: few of them differ.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.training import build, evaluate
from bench.training.target import load_target
from shared import config as settings
from tests.support import replay  # loads a BLAS, so it goes before anything that imports MLX

mx = replay.mx

NUM_DOCUMENTS = int(os.environ.get("DRAFTERS_DOCUMENTS", "4"))
GGUF = settings.load().cache_folder / "models" / replay.GGUF

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.timeout(1200),
    pytest.mark.skipif("DRAFTERS_DOCUMENTS" not in os.environ, reason="takes minutes: make test-drafters"),
    pytest.mark.skipif(not (replay.FOLDER / "held_out.json").exists(), reason="no reference drafters"),
    pytest.mark.skipif(not Path(GGUF).exists(), reason="the embedded model was not fetched yet"),
]


@pytest.fixture(scope="module")
def target():
    return load_target(str(GGUF), dtype="float32")


@pytest.mark.parametrize("name", replay.NUM_TOKENS)
def test_evaluation_finds_the_stated_acceptance(name, target):
    documents = replay.load_documents(NUM_DOCUMENTS)
    drafter = build.of_folder(replay.FOLDER / name, target)
    target.tap(drafter.taps)
    draft = evaluate.drafting(drafter, build.read(replay.FOLDER / name, drafter), target, mx.float32)
    texts, prompts = [d["token_ids"] for d in documents], [d["num_prompt_tokens"] for d in documents]
    found = evaluate.accept(draft, texts, prompts, drafter.num_predictions, replay.NUM_TOKENS[name])
    expected = [d["committed_per_round"][name] for d in documents]
    assert [sum(r) for r in found.rounds] == [sum(r) for r in expected]
    wanted = sum(map(sum, expected)) / sum(map(len, expected))
    tolerance = 0.015 if NUM_DOCUMENTS >= 20 else 0.03  # as in test_real_drafters.py
    assert found.mean_length == pytest.approx(wanted, rel=tolerance)
    assert found.mean_of_documents == pytest.approx(replay.mean_acceptance_length(expected), rel=tolerance)
