"""Layers in few operations give what the layers that they stand for give, through kernels and without."""

from __future__ import annotations

import os

os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from workers.cache.layouts import LAYOUTS, make_store
from workers.early_start import install_starts
from workers.kernels.choice import AttentionChoice, Form, ShapeClass
from workers.kernels.reference import ReferenceAttention
from workers.models import decoder
from workers.models.lean import LeanLayer
from workers.viewed_weights import ViewedLinear, view_weights

pytestmark = pytest.mark.mlx

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SCALED = {"llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 8, "rope_type": "default"}
LEAN: dict[str, tuple[dict[str, Any], Form]] = {
    "llama": ({"model_type": "llama"}, "joined"),
    "biases": ({"model_type": "llama", "attention_bias": True, "mlp_bias": True}, "joined"),
    "qwen2": ({"model_type": "qwen2"}, "joined"),
    "qwen3": ({"model_type": "qwen3"}, "normed"),
    "window": ({"model_type": "mistral", "sliding_window": 12}, "joined"),
}


class Counted(ReferenceAttention):
    """How often rows came joined, and apart."""

    def __init__(self) -> None:
        self.num_joined = self.num_apart = 0

    def attend_joined(self, *arguments: Any) -> mx.array:
        self.num_joined += 1
        self.num_apart -= 1  # it hands them on
        return super().attend_joined(*arguments)

    def attend(self, *arguments: Any) -> mx.array:
        self.num_apart += 1
        return super().attend(*arguments)


def make(overrides: dict[str, Any], bits: int | None) -> decoder.Model:
    mx.random.seed(4)
    model = decoder.Model(decoder.DecoderConfig.from_hf({**SHAPE, **overrides}, 128))
    for name, value in model.named_modules():
        if name.endswith("norm"):
            value.weight = 1 + 0.3 * mx.random.normal(value.weight.shape)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


def as_on_a_gpu(model: decoder.Model) -> None:
    for layer in model.layers:
        layer.self_attn.is_cpu = layer.mlp.is_cpu = False
    model.is_cpu = False
    model.fuse()


def played(model: decoder.Model, attention: ReferenceAttention | None, layout: str = "slots") -> np.ndarray[Any, Any]:
    """Hidden rows of two sequences that go on from different positions: a chunk each, then steps of 1 and 4 tokens, and
    a chunk behind what is there."""
    specs = model.layer_specs()
    store = make_store(layout, list(specs), [64, 128], 32, mx.float32, is_exact=False, slack=64)
    if attention is not None:
        form = model.attention_form
        used = [ShapeClass(4, 2, 32, rows, mx.float32, form=form) for rows in (1, 4, 16)]
        used += [ShapeClass(4, 2, 32, rows, mx.float32) for rows in (0, 1, 4, 16)]
        store.use_attention(AttentionChoice(attention, dict.fromkeys(used, True), has_tiles=True))
    tokens = mx.random.randint(0, 96, (2, 128), key=mx.random.key(1))
    outs = []

    def step(slots: list[int], starts: list[int], width: int) -> None:
        batch = store.open(slots, starts, width)
        ids = mx.stack([tokens[slots[i], starts[i] : starts[i] + width] for i in batch.order])
        out = model.hidden(ids, cache=batch.layers)
        outs.append(np.array(out[mx.array(np.argsort(batch.order))]).reshape(-1, out.shape[-1]))

    for slot, capacity in ((0, 64), (1, 128)):
        store.ensure(slot, capacity)
    step([0], [0], 7)
    step([1], [0], 19)
    starts = [7, 19]
    for width in (1, 1, 4, 1, 4):
        step([0, 1], starts, width)
        step([1], [starts[1]], width)  # one row alone, once more
        starts = [s + width for s in starts]
    step([0, 1], starts, 32)
    return np.concatenate(outs)


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "quantised"])
@pytest.mark.parametrize(("overrides", "form"), LEAN.values(), ids=LEAN)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lean_layers_give_the_same_rows(layout: str, overrides: dict[str, Any], form: Form, bits: int | None) -> None:
    expected = played(make(overrides, bits), None)
    model = make(overrides, bits)
    as_on_a_gpu(model)
    assert model.attention_form == form
    model.join_attention_inputs()
    assert all(isinstance(layer.lean, LeanLayer) for layer in model.layers)
    counted = Counted()
    np.testing.assert_allclose(played(model, counted, layout), expected, atol=2e-5)
    launches = (
        5 * 3 + 2 if layout == "slots" else 5 * 2 + 1
    )  # of two slots in two classes, and of one; blocks have none
    assert counted.num_joined == 3 * launches, "three layers"
    assert counted.num_apart == 0
    np.testing.assert_allclose(played(model, None, layout), expected, atol=2e-5)


@pytest.mark.parametrize("scaling", [
    {"model_type": "llama", "rope_parameters": YARN},
    {"model_type": "ministral3", "rope_parameters": SCALED},
], ids=["yarn", "query scaling"])  # fmt: skip
def test_what_a_kernel_does_not_compute_stays_as_it_was(scaling: dict[str, Any]) -> None:
    expected = played(make(scaling, None), None)
    model = make(scaling, None)
    as_on_a_gpu(model)
    assert model.attention_form == "apart"
    model.join_attention_inputs()
    assert all(layer.lean is None and "qkv_proj" in layer.self_attn for layer in model.layers)
    counted = Counted()
    np.testing.assert_allclose(played(model, counted), expected, atol=2e-5)
    assert counted.num_joined == 0
    assert counted.num_apart == 3 * (5 * 3 + 2), "the last chunk in tiles"


def test_projections_of_different_kinds_stay_apart() -> None:
    model = make({"model_type": "llama"}, None)
    as_on_a_gpu(model)
    model.layers[1].self_attn.k_proj = model.layers[1].self_attn.k_proj.to_quantized(group_size=32, bits=4)
    assert model.attention_form == "apart"


def test_weights_are_viewed_also_in_blocks_that_something_stands_in_for() -> None:
    model = make({"model_type": "llama", "mlp_bias": True}, None)
    expected = np.array(model(mx.arange(9)[None]))
    install_starts(model)
    view_weights(model)
    for layer in model.model.layers:
        assert type(layer.self_attn.o_proj) is ViewedLinear
        assert type(layer.mlp.down_proj) is nn.Linear, "one with a bias is one operation already"
    assert type(model.lm_head) is ViewedLinear
    assert "_transposed" not in dict(model.lm_head.parameters())
    np.testing.assert_array_equal(np.array(model(mx.arange(9)[None])), expected)
