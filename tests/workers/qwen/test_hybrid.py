"""The gated delta net's trails and the hybrid layers as a GPU runs them: padded rows, joined products, kernels."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache

from tests.support.engine_rig import EngineRig, ForcedDrafts, make_engine, make_prompts, mlx_lm_target
from tests.support.layouts import PAGES, EveryShape
from workers.cache.recurrent import RecurrentLayer, RecurrentView
from workers.cache.spec import RecurrentSpec
from workers.kernels.reference import ReferenceAttention
from workers.models import mlxlm
from workers.models.qwen.hybrid import GatedDeltaNet, NextGatedDeltaNet, short_convolution

pytestmark = pytest.mark.mlx

NUM_TOKENS = 30
PROMPTS = make_prompts(8)
ARGS = qwen3_5.TextModelArgs(
    hidden_size=32, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
)


def delta_net(is_joined: bool) -> GatedDeltaNet:
    mx.random.seed(3)
    made = qwen3_5.GatedDeltaNet(ARGS)
    made.__class__ = GatedDeltaNet
    if is_joined:
        made.join()
    return made


@pytest.mark.parametrize("is_joined", [False, True])
def test_a_trail_gives_the_state_after_each_number_of_tokens(is_joined: bool) -> None:
    layer, length, lengths = delta_net(is_joined), 6, [6, 5, 4, 6]
    x = mx.random.normal((4, 9, 32))
    cache = RecurrentLayer(RecurrentSpec(2))
    slots = [4, 7, 1, 2]
    view = RecurrentView(cache, slots, None, 0, [3] * 4)
    layer(x[:, :3], None, view)
    view.close()
    view = RecurrentView(cache, slots, mx.array(lengths), 3, lengths)
    view.has_drafts = True
    layer(x[:, 3:], view.make_mask(length), view)
    view.close()
    cache.rewind({7: 2, 1: 4, 2: 1})
    kept = {4: 6, 7: 2, 1: 4, 2: 1}
    for row, slot in enumerate(slots):
        alone = ArraysCache(2)
        layer(x[row : row + 1, : 3 + kept[slot]], None, alone)
        for got, wanted in zip(cache.stacked([slot]), alone.cache, strict=True):
            np.testing.assert_allclose(np.array(got), np.array(wanted), atol=2e-6)


def test_rewinding_twice_or_an_unknown_slot_changes_nothing() -> None:
    layer, cache = delta_net(False), RecurrentLayer(RecurrentSpec(2))
    view = RecurrentView(cache, [0], None, 0, [4])
    view.has_drafts = True
    layer(mx.random.normal((1, 4, 32)), None, view)
    view.close()
    cache.rewind({0: 2, 5: 1})
    first = cache.stacked([0])
    cache.rewind({0: 1})
    assert all(a is b for a, b in zip(cache.stacked([0]), first, strict=True))
    cache.release(0)
    assert cache.stacked([0]) == [None, None]


def test_the_elementwise_convolution_is_the_layers_own() -> None:
    plain, joined = delta_net(False), delta_net(True)
    x = mx.random.normal((3, 3 + 5, plain.conv_dim))
    np.testing.assert_allclose(
        np.array(short_convolution(x, joined._taps)), np.array(plain._convolved(x)), rtol=1e-5, atol=1e-6
    )


@pytest.fixture(params=["qwen3_5", "qwen3_next"])
def targets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """(the model as on a CPU, the same weights as on a GPU)."""
    exact = mlx_lm_target(request.param)
    monkeypatch.setattr(mlxlm, "is_cpu", lambda: False)
    return exact, mlx_lm_target(request.param)


@pytest.mark.parametrize("layout", ["slots", PAGES])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_padded_rows_with_drafts_give_the_text_of_plain_decoding(targets, has_kernels: bool, layout: str) -> None:
    expected = EngineRig(make_engine(targets[0])).run(PROMPTS, NUM_TOKENS)
    assert len({t for tokens in expected.values() for t in tokens}) > 5, "a text that tells nothing"
    engine = make_engine(targets[1], is_exact=False, layout=layout)
    reference = Counted()
    if has_kernels:
        engine.store.use_attention(EveryShape(reference))
    known = {name: PROMPTS[name] + output for name, output in expected.items()}
    known |= {f"stranger{i}": PROMPTS[f"r{i}"][::-1] + expected[f"r{i}"] for i in range(len(expected))}
    chances = {name: (0.0, 0.4, 0.8, 1.0)[i % 4] for i, name in enumerate(PROMPTS)}
    chances |= {f"stranger{i}": 0.5 for i in range(len(PROMPTS))}
    widths: list[tuple[int, int]] = []
    hidden_rows = engine.model.hidden_rows

    def watched(inputs, *rest):
        widths.append(inputs.shape)
        return hidden_rows(inputs, *rest)

    engine.model.hidden_rows = watched
    rig = EngineRig(engine, ForcedDrafts(known, chances), k=5)
    assert rig.run(PROMPTS, NUM_TOKENS, schedule=random.Random(5)) == expected
    for name in PROMPTS:
        drafted, accepted = rig.counts([name])
        assert drafted > 0
        assert accepted == {0.0: 0, 1.0: drafted}.get(chances[name], accepted)
    assert {width for _, width in widths if width < 16} <= {1, 2, 4, 8}, "few shapes"
    assert max(batch for batch, width in widths if width == 8) >= 4, "rows of all widths share a forward"
    assert (reference.num_calls > 0) == has_kernels


class Counted(ReferenceAttention):
    num_calls = 0

    def attend(self, *arguments, **keywords):
        self.num_calls += 1
        return super().attend(*arguments, **keywords)


def test_layers_tell_their_query_heads_and_run_by_forwards_of_ours(targets) -> None:
    for target in targets:
        layers = target.model.layers
        assert len(target.query_heads()) == sum(not layer.is_linear for layer in layers)
        assert all(isinstance(x.linear_attn, GatedDeltaNet | NextGatedDeltaNet) for x in layers if x.is_linear)
