"""The doctor's self-test: right on this machine, and not deaf to wrong tokens."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import pytest

from shared.config import Settings
from workers import blas, self_test
from workers.self_test import NUM_TOKENS, run

pytestmark = pytest.mark.mlx


@pytest.fixture(autouse=True)
def _blas_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX is imported already, where `prepare` refuses."""
    monkeypatch.setattr(blas, "prepare", lambda _: "BLAS: the test's")
    monkeypatch.setattr(self_test, "PRODUCT_SIZE", 64)  # there may be no fast BLAS here


def test_the_engines_tokens_are_those_of_a_plain_forward() -> None:
    report = run(Settings(attention="stock"), is_tiny=True)
    assert report.is_right and report.deficit is not None and report.deficit < 0.05
    assert report.num_tokens == NUM_TOKENS and report.tokens_per_s > 0 and report.gflops > 0
    assert (report.model, report.blas) == ("tiny random model", "BLAS: the test's")


def test_a_wrong_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_test.generate

    def wrong(engine: object, prompt: list[int]) -> list[int]:
        tokens = right(engine, prompt)  # type: ignore[arg-type] # passed on
        return [*tokens[:-1], (tokens[-1] + 1) % 512]

    monkeypatch.setattr(self_test, "generate", wrong)
    report = run(Settings(attention="stock"), is_tiny=True)
    assert not report.is_right and report.deficit is not None and report.deficit > 0.05
