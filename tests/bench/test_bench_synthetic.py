"""Speculation with a synthetic acceptance: a tiny Gemma 4, its random assistant, and the rows between them."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from bench.model_shapes import assistant_config
from workers.drafters.gemma4_assistant import AssistantConfig, Gemma4Assistant

pytestmark = pytest.mark.mlx


@pytest.mark.parametrize(("shape", "num_bytes"), [("gemma4-e4b", 159_138_208), ("gemma4-26b-a4b", 839_427_840)])
def test_assistants_are_as_large_as_the_published_files(shape: str, num_bytes: int) -> None:
    model = Gemma4Assistant(AssistantConfig.from_hf(assistant_config(shape)))  # nothing is evaluated
    sizes = [a.size * (2 if mx.issubdtype(a.dtype, mx.floating) else 8) for _, a in tree_flatten(model.parameters())]
    assert 0 < num_bytes - sum(sizes) < 8192, "the header"
