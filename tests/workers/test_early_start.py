"""A forward that is begun in parts gives what it gives whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

from bench.model_shapes import random_model
from shared.messages import RequestId, SequenceStart, Step, StepRow
from tests.support.engine_rig import GREEDY, decoder_target, make_engine
from workers import early_start
from workers.early_start import StartLayer, Starts, install_starts
from workers.engine import Engine
from workers.features import block_list, install_taps

pytestmark = pytest.mark.mlx


@pytest.mark.parametrize("shape", ["tiny", "qwen3.5-tiny", "gemma4-tiny"])
def test_parts_are_begun_and_change_nothing(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(shape, "float32").model
    tokens = mx.array([[3, 1, 4, 1, 5]])
    whole = model.hidden(tokens)
    begun: list[tuple[int, ...]] = []

    def begin(arrays: list[mx.array]) -> None:
        mx.eval(arrays)
        begun.append(arrays[0].shape)

    monkeypatch.setattr(early_start, "start_evaluating", begin)
    starts = install_starts(model, every=1)
    captured = install_taps(model, [0])
    assert mx.array_equal(model.hidden(tokens), whole)
    num_layers = len(block_list(model) or [])
    assert len(begun) == num_layers - 1 and set(begun) == {whole.shape}
    assert captured[0].shape == whole.shape
    starts.is_on = False
    assert mx.array_equal(model.hidden(tokens), whole)
    assert len(begun) == num_layers - 1


def test_a_step_behind_another_one_is_handed_over_whole() -> None:
    starts = Starts()
    model = decoder_target()
    plain = make_engine(model, 2)
    engine = Engine(plain.model, plain.store, 2, model.vocab_size, starts=starts)
    tokens = [3, 1, 4]
    start = SequenceStart(
        slot=0, request_id=RequestId("r"), sampling=GREEDY, num_prompt_tokens=len(tokens), token_ids=tokens
    )
    prefill = StepRow(slot=0, start=0, capacity=16, token_ids=tokens)
    engine.finish(engine.begin(Step(epoch=0, step_id=0, starts=[start], decodes=[], prefills=[prefill])))
    pending, was_on = [], []
    for at in range(3, 6):
        step = Step(
            epoch=0, step_id=at, starts=[], decodes=[StepRow(slot=0, start=at, capacity=16)], prefills=[]
        )  # fmt: skip
        pending.append(engine.begin(step))
        was_on.append(starts.is_on)
    assert was_on == [True, False, False]
    for one in pending:
        engine.finish(one)
    row = StepRow(slot=0, start=6, capacity=16, token_ids=[7, 8], num_drafts=1)
    engine.begin(Step(epoch=0, step_id=6, starts=[], decodes=[row], prefills=[]))
    assert starts.is_on


def test_a_model_without_a_list_of_blocks_is_left_as_it_is() -> None:
    model = object()
    install_starts(model)
    assert not isinstance(model, StartLayer)
