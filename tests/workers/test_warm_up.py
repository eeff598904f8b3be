"""What is compiled before the first request: on CUDA also MLX's attention for long prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from bench.model_shapes import random_model
from shared.config import Settings
from shared.messages import Step
from workers import build
from workers.engine import PendingStep

pytestmark = pytest.mark.mlx


@pytest.mark.parametrize(
    ("is_cuda", "step_tokens", "expected"),
    [(False, 4096, [16]), (True, 4096, [16, 2048, 192]), (True, 512, [16, 512, 192])],
)
def test_prompts_that_are_played_before_the_first_request(
    is_cuda: bool, step_tokens: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(max_num_batched_tokens=step_tokens, cache_dir=str(tmp_path))
    engine, info = build.make_engine(random_model("tiny", "float32", 4096), settings)
    monkeypatch.setattr(build, "has_own_memory", lambda: is_cuda)
    played: list[int] = []
    begin = engine.begin

    def watched(step: Step) -> PendingStep:
        played.extend(len(row.token_ids or []) for row in step.prefills)
        return begin(step)

    engine.begin = watched  # type: ignore[method-assign]
    build.warm_up(engine, info)
    assert played == expected
