"""Gemma 4's assistant against transformers: several tokens a draft, ragged batches, both heads."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import BadModel
from tests.workers.gemma import assistants, hf
from tests.workers.gemma.assistants import CASES, TEXT
from workers.drafters.gemma4_assistant import AssistantConfig, load_assistant
from workers.models.rope import rotated

pytestmark = [pytest.mark.mlx, pytest.mark.oracle]

BACKBONE = 48
LENGTHS = (5, 30, 9, 10)  # below, beyond, and around the window


def assistant(transformers, folder, overrides):
    reference = assistants.save(transformers, folder, BACKBONE, overrides)
    return reference, load_assistant(folder, mx.float32)


def target_rows(rng):
    """By layer kind (keys, values), each (B, heads, longest, head_dim)."""
    dims = {"sliding_attention": 16, "full_attention": 32}
    return {
        kind: [rng.standard_normal((len(LENGTHS), 2, max(LENGTHS), dim)).astype(np.float32) for _ in range(2)]
        for kind, dim in dims.items()
    }


class HeldRows:
    """The `LayerCache` of one query per row over given rows; the window as the layer asks for it."""

    offset = 0

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def attend(self, q, k, v, scale, window=None, sinks=None, rotation=None, sees_spans=False):
        assert k is None and v is None, "an assistant's layers write no keys"
        index, end = mx.arange(self.keys.shape[2])[None], mx.array(LENGTHS)[:, None]
        seen = index < end if window is None else (index < end) & (index >= end - window)
        return mx.fast.scaled_dot_product_attention(
            rotated(q, rotation), self.keys, self.values, scale=scale, mask=seen[:, None, None]
        )


@pytest.mark.parametrize("case", CASES)
def test_drafts_equal_transformers(transformers, tmp_path, case):
    """Four tokens a draft; each row's next input is its own last token and hidden row, its position stays."""
    import torch

    reference, model = assistant(transformers, tmp_path, CASES[case])
    rng = np.random.default_rng(3)
    table = rng.standard_normal((hf.VOCAB, BACKBONE)).astype(np.float32)
    rows = target_rows(rng)
    hidden = rng.standard_normal((len(LENGTHS), BACKBONE)).astype(np.float32)
    tokens = np.array([4, 8, 15, 16])
    caches = {kind: HeldRows(*(mx.array(a) for a in pair)) for kind, pair in rows.items()}
    positions = mx.array(LENGTHS)
    theirs = torch.tensor(hidden)
    our_hidden, drafted = mx.array(hidden), []
    for _ in range(4):
        logits, our_hidden = model(mx.array(table[tokens]), our_hidden, caches, positions)
        for b, length in enumerate(LENGTHS):
            with torch.no_grad():
                expected = reference(
                    inputs_embeds=torch.cat([torch.tensor(table[tokens[b]]), theirs[b]])[None, None],
                    position_ids=torch.tensor([[length]]),
                    shared_kv_states={
                        kind: tuple(torch.tensor(a[b : b + 1, :, :length]) for a in pair) for kind, pair in rows.items()
                    },
                )
            got = np.array(logits[b])
            wanted = expected.logits[0, 0].numpy()
            if "centroids" in case:  # what stands for a token that was not scored depends on the batch there
                is_scored = wanted > wanted.min()
                assert is_scored.sum() == 3 * hf.VOCAB // 8
                np.testing.assert_allclose(got[is_scored], wanted[is_scored], rtol=0, atol=1e-4)
                assert got[~is_scored].max() < got[is_scored].min()
            else:
                np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
            np.testing.assert_allclose(
                np.array(our_hidden[b]), expected.last_hidden_state[0, 0].numpy(), rtol=0, atol=1e-4
            )
            theirs[b] = expected.last_hidden_state[0, 0]
        tokens = np.array(mx.argmax(logits, axis=-1))
        drafted.append(tokens.tolist())
    assert len({t for step in drafted for t in step}) > 3, "a draft that tells nothing"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma4_text"}, "no Gemma 4 assistant"),
        ({"text_config": {**TEXT, "enable_moe_block": True}}, "experts"),
        ({"use_ordered_embeddings": True, "num_centroids": 7}, "96 tokens in 7 clusters"),
    ],
)
def test_what_is_no_assistant_is_refused(changes, reason):
    config = {"model_type": "gemma4_assistant", "text_config": TEXT, "backbone_hidden_size": BACKBONE, **changes}
    with pytest.raises(BadModel, match=reason):
        AssistantConfig.from_hf(config)


def test_tensors_that_do_not_fit_are_refused(transformers, tmp_path):
    assistant(transformers, tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone_hidden_size": BACKBONE + 1}))
    with pytest.raises(BadModel, match="pre_projection"):
        load_assistant(tmp_path, mx.float32)
