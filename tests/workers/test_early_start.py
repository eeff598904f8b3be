"""A forward that is begun in parts gives what it gives whole."""

from __future__ import annotations

import mlx.core as mx
import pytest

from bench.model_shapes import random_model
from workers import early_start
from workers.early_start import StartLayer, install_starts
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
    install_starts(model, every=1)
    captured = install_taps(model, [0])
    assert mx.array_equal(model.hidden(tokens), whole)
    num_layers = len(block_list(model) or [])
    assert len(begun) == num_layers - 1 and set(begun) == {whole.shape}
    assert captured[0].shape == whole.shape


def test_a_model_without_a_list_of_blocks_is_left_as_it_is() -> None:
    model = object()
    install_starts(model)
    assert not isinstance(model, StartLayer)
