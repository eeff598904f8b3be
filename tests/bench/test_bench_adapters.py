"""The benchmark of LoRA adapters, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import adapters
from tests.support import tiny_model
from tests.support.server import REPOSITORY

pytestmark = pytest.mark.mlx


def test_each_step_is_timed_for_each_use(tmp_path: Path) -> None:
    model, path = tiny_model.write(tmp_path / "tiny"), tmp_path / "result.json"
    arguments = ["--model", str(model), "--adapters", "2", "--rank", "3", "--repeats", "1", "--blas", "off"]
    command = [sys.executable, "-m", "bench.adapters", *arguments, "--json", str(path)]  # it loads BLAS before MLX
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=120, stdout=subprocess.DEVNULL)
    steps = json.loads(path.read_text())["steps"]
    assert [step["rows"] for step in steps] == [name for name, *_ in adapters.STEPS]
    for step in steps:
        assert list(step["ms"]) == ["none loaded", "loaded, unused", "one for all rows", "all in turn"]
        assert all(ms > 0 for ms in step["ms"].values())
