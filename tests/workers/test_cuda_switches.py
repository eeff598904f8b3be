"""MLX's switches on CUDA, as they are set before its first operation; nothing of this needs a GPU."""

from __future__ import annotations

import json
import os
import sys

import pytest

from shared.config import Settings, load
from shared.model_files import ModelFiles
from workers import blas, build, cuda


@pytest.mark.parametrize(
    ("model_type", "attention", "is_ours"),
    [("llama", "auto", True), ("qwen3", "kernel", True), ("llama", "stock", False), ("mamba", "auto", False)],
)
def test_graphs_are_left_out_for_models_of_our_own_attention(tmp_path, model_type, attention, is_ours):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    files = ModelFiles(name="m", folder=tmp_path)
    assert build.has_own_attention(files, Settings(attention=attention)) == is_ours


def test_a_folder_that_cannot_be_read_changes_nothing(tmp_path):
    assert not build.has_own_attention(ModelFiles(name="m", folder=tmp_path), Settings())


def test_what_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    cuda.leave_out_graphs()
    assert os.environ["MLX_USE_CUDA_GRAPHS"] == "1"


def test_cuda_switches_are_set_where_the_user_has_not(monkeypatch):
    monkeypatch.setattr(blas, "is_cuda_used", lambda: True)
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    for name in cuda.DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLX_CUDA_GRAPH_CACHE_SIZE", "17")
    assert "CUDA" in blas.prepare(load())
    assert os.environ["MLX_ENABLE_CACHE_THRASHING_CHECK"] == "0"
    assert os.environ["MLX_CUDA_GRAPH_CACHE_SIZE"] == "17"
    assert os.environ["MLX_CUDA_SDPA_CACHE_SIZE"] == cuda.DEFAULTS["MLX_CUDA_SDPA_CACHE_SIZE"]
