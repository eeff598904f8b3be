"""The exactness probe on tiny targets, and on one whose verified rows really differ."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import mlx.core as mx
import pytest

from tests.support.engine_rig import VOCAB, WINDOW, EngineRig, decoder_target, make_engine, mlx_lm_target
from tests.support.fake_target import worker_info
from workers.exactness import NUM_POSITIONS, WIDTHS, describe, probe

pytestmark = pytest.mark.mlx

INFO = worker_info(vocab_size=VOCAB, max_model_len=128)
TARGETS = {
    "plain": decoder_target,
    "sliding": lambda: decoder_target(window=WINDOW),
    "qwen3_next": lambda: mlx_lm_target("qwen3_next"),
    "lfm2": lambda: mlx_lm_target("lfm2"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_in_float32_verified_logits_differ_in_their_last_bits_only(target):
    found = probe(make_engine(TARGETS[target]()), INFO)
    assert found.max_logit_difference < 1e-4
    assert found.num_flipped == 0
    assert found.min_top_two_gap > 0
    assert (found.widths, found.num_positions) == (list(WIDTHS), NUM_POSITIONS)
    assert not found.can_ties_flip
    assert "no greedy tie" in describe(found)


def test_rows_that_differ_by_more_than_the_gap_are_told(monkeypatch):
    engine = make_engine(decoder_target())
    head = engine.model.head

    def noisy(rows):
        logits = head(rows)
        if rows.shape[0] == 1:
            return logits
        return logits + 50.0 * mx.random.normal(logits.shape, key=mx.random.key(rows.shape[0]))

    monkeypatch.setattr(engine.model, "head", noisy)
    found = probe(engine, INFO)
    assert found.max_logit_difference > 10
    assert found.num_flipped > 0
    assert found.can_ties_flip
    assert "can flip" in describe(found)


def test_the_engine_is_as_before_and_a_tiny_context_is_left_out():
    engine = make_engine(decoder_target(window=WINDOW))
    before = EngineRig(engine).run({"a": [1, 2, 3]}, 12)
    assert probe(engine, INFO) is not None
    assert EngineRig(engine).run({"a": [1, 2, 3]}, 12) == before
    assert probe(engine, worker_info(max_model_len=16)) is None
