"""The drafter benchmark with servers that it starts itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.drafters import main

pytestmark = [pytest.mark.system, pytest.mark.mlx]


def test_one_command_starts_both_servers_and_compares_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANDEM_BLAS_THREADS", "1")
    output = tmp_path / "drafters.json"
    options = ["--model", str(model), "--arms", "none,ngram@3", "--workloads", "repeat-json", "--concurrency", "2"]
    options += ["--requests-per-cell", "2", "--output-tokens", "24", "--warmup-tokens", "0", "--repeats", "1"]
    assert main([*options, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    plain, drafted = result["cells"]
    assert (plain["arm"], drafted["arm"]) == ("none", "ngram")
    assert plain["speculation"]["num_drafts"] == 0 < drafted["speculation"]["num_drafts"]
    assert drafted["parity"] == {"compared": 2, "identical": 2}
    assert drafted["summary"]["output_tokens"] == plain["summary"]["output_tokens"] == 48
    assert result["health"]["ngram"]["exactness"]["num_flipped"] == 0
