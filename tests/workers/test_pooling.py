"""Pooled prompts beside requests that generate, through the real core and engine, against transformers."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random

import numpy as np
import pytest

from shared.messages import Cancel, RequestId
from shared.model_files import ModelFiles
from tests.support import tiny_embedder
from tests.support.engine_rig import EngineRig, make_engine
from workers.load import load

pytestmark = pytest.mark.mlx

BLOCK = 8


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    pytest.importorskip("torch")
    folder = tiny_embedder.write(tmp_path_factory.mktemp("embedder") / "tiny")
    return tiny_embedder.Oracle(folder), load(ModelFiles(name="tiny", folder=folder), "float32").model


def prompts(num):
    """Some share their beginning; the longest takes several chunks."""
    draw = random.Random(1)
    common = [draw.randrange(256) for _ in range(3 * BLOCK)]
    return [
        (common if i % 2 else []) + [draw.randrange(256) for _ in range(draw.choice((1, 5, 20, 60)))]
        for i in range(num)
    ]


def vector(rig, name):
    (output,) = rig.outputs[name]
    assert (output.finish_reason, output.token_ids, output.error) == ("stop", [], None)
    return np.frombuffer(output.embedding, "<f4")


@pytest.mark.parametrize("kind", ["last", "mean"])
def test_vectors_are_transformers_whatever_is_cached_and_runs_beside_them(embedder, kind):
    oracle, model = embedder
    rig = EngineRig(make_engine(model, block_size=BLOCK), num_blocks=64)
    texts = prompts(10)
    alone = EngineRig(make_engine(model), num_blocks=0).run({f"chat{i}": text for i, text in enumerate(texts)}, 12)
    for turn in ("cold", "warm"):
        for i, text in enumerate(texts):
            rig.submit(f"chat{i}" if turn == "cold" else f"again{i}", text, 12)
            rig.submit(f"{turn}{i}", text, 1, pooling=kind)
            for _ in range(i % 3):
                rig.work()
        rig.drain()
        for i, text in enumerate(texts):
            np.testing.assert_allclose(vector(rig, f"{turn}{i}"), oracle.vector(text, kind), atol=1e-4, rtol=1e-4)
    assert rig.core.metrics.prefix.hit_tokens > 0, "nothing was found in the cache"
    cached = [rig.outputs[f"warm{i}"][-1].timings.num_cached_tokens for i in range(len(texts))]
    assert any(cached) if kind == "last" else not any(cached), "a mean needs every row computed"
    for i in range(len(texts)):
        assert rig.tokens(f"chat{i}") == rig.tokens(f"again{i}") == alone[f"chat{i}"]
    assert rig.session.slots.used_tokens == 0


def test_a_cancelled_pooled_prompt_frees_its_slot_and_another_takes_it(embedder):
    oracle, model = embedder
    rig = EngineRig(make_engine(model, num_slots=1), num_blocks=0)
    long, short = [7] * 100, [9, 4, 2]
    rig.submit("gone", long, 1, pooling="mean")
    assert rig.work(), "its first chunk"
    rig.submit("next", short, 1, pooling="mean")
    rig.send("front", Cancel(request_id=RequestId("gone")))
    rig.drain()
    (output,) = rig.outputs["gone"]
    assert (output.finish_reason, output.embedding) == ("abort", None)
    np.testing.assert_allclose(vector(rig, "next"), oracle.vector(short, "mean"), atol=1e-4, rtol=1e-4)


def test_a_row_that_is_not_a_number_fails_alone(embedder):
    _, model = embedder
    rig = EngineRig(make_engine(model), num_blocks=0)
    final_rows, rig.engine.model.final_rows = rig.engine.model.final_rows, lambda: final_rows() * float("nan")
    rig.submit("bad", [1, 2, 3], 1, pooling="last")
    rig.submit("good", [1, 2, 3], 4)
    rig.drain()
    assert rig.outputs["bad"][-1].finish_reason == "error"
    assert "NaN" in rig.outputs["bad"][-1].error
    assert len(rig.tokens("good")) == 4
