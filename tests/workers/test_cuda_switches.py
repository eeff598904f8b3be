"""MLX's switches on CUDA, as they are set before its first operation; nothing of this needs a GPU."""

from __future__ import annotations

import json
import os
import sys

import pytest

from bench.model_shapes import SHAPES
from shared.config import Settings, load
from shared.model_files import ModelFiles
from workers import blas, build, cuda
from workers.own_attention import may_serve_all

SMALL = {
    "hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 64, "num_attention_heads": 8, "vocab_size": 99,
    "num_key_value_heads": 4, "head_dim": 64, "sliding_window": 32,
}  # fmt: skip
VISION = {
    "vision_config": {
        "depth": 2, "embed_dim": 16, "hidden_size": 512, "mlp_ratio": 2, "num_heads": 2, "patch_size": 4,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "attention", "is_ours"),
    [
        ({"model_type": "llama"}, "auto", True),
        ({"model_type": "llama"}, "stock", False),
        ({"model_type": "llama", "head_dim": 72}, "auto", False),
        ({"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 1}, "auto", False),
        ({"model_type": "qwen3"}, "kernel", True),
        ({"model_type": "qwen2_vl", **VISION}, "auto", True),
        ({"model_type": "gemma3_text", "head_dim": 256}, "auto", True),
        ({"model_type": "gemma3", "text_config": SMALL}, "auto", True),
        ({"model_type": "gemma4_text", "head_dim": 256}, "auto", False),  # full layers have heads of 512
        ({"model_type": "gemma4", "text_config": SMALL}, "kernel", False),
        ({"model_type": "gemma4_text", "global_head_dim": 128}, "auto", True),
        ({"model_type": "mamba"}, "auto", False),
    ],
)
def test_graphs_are_left_out_where_every_layer_may_be_ours(tmp_path, config, attention, is_ours):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | config))
    files = ModelFiles(name="m", folder=tmp_path)
    assert build.is_all_our_attention(files, Settings(attention=attention)) == is_ours


@pytest.mark.parametrize(("shape", "is_ours"), [("8b", True), ("gemma4-e4b", False), ("qwen3.5-4b", False)])
def test_shapes_of_the_benchmarks_are_told_apart_alike(shape, is_ours):
    assert may_serve_all(SHAPES[shape]) == is_ours


@pytest.mark.parametrize("config", [None, {"model_type": "llama"}])
def test_a_folder_that_cannot_be_read_changes_nothing(tmp_path, config):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert not build.is_all_our_attention(ModelFiles(name="m", folder=tmp_path), Settings())


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
